"""Text sampled from the model: what a cacheless loop over whole documents writes, and nothing else touched."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcli.data import generated as self_text
from qcli.data.generated import sample
from qcli.models.open import open_source
from qcli.utils.errors import ResourceError, UsageError
from tests.determinism import as_on_a_gpu
from tests.tiny import SPECIAL, VOCAB, tiny_model

ENDS = list(range(0, VOCAB, 5))  # random models end a document rarely: let every fifth token end one
STARTS = [token for token in range(len(SPECIAL) + 256) if token not in {*ENDS, *range(len(SPECIAL))}]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on every machine."""
    monkeypatch.setattr(self_text, "has_fast_matmul", lambda _: False)


@torch.no_grad()
def written(model: torch.nn.Module, generator: random.Random, length: int) -> list[int]:
    """The same recipe, one window alone, each document run whole for each of its tokens."""
    document = [generator.choice(STARTS)]
    window = list(document)
    while len(window) < length:
        logits = model(input_ids=torch.tensor([document]), use_cache=False).logits[0, -1]
        draw, fresh = generator.random(), generator.choice(STARTS)
        if document[-1] in ENDS:
            document = [fresh]
        elif len(document) <= 4:
            document = [*document, int(logits.argmax())]
        else:
            cumulative = logits.softmax(-1).double().cumsum(-1)
            document = [*document, int((cumulative <= draw * cumulative[-1]).sum())]
        window.append(document[-1])
    return window


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "mistral"])
@pytest.mark.usefixtures("exact")
def test_documents_are_what_the_model_writes_from_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text, "_end_tokens", lambda *_: ENDS)
    folder = tiny_model(family, tmp_path)
    windows = sample(open_source(str(folder)), 3, 48, "test")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in evaluation mode
    expected = [written(whole, random.Random(f"test:{number}"), 48) for number in range(3)]
    assert windows.tolist() == expected
    assert torch.isin(windows[:, :-1], torch.tensor(ENDS)).any()


@pytest.mark.usefixtures("exact")
def test_a_window_depends_on_seed_and_number_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(tiny_model("llama", tmp_path)))
    together = sample(source, 5, 24, "a")
    monkeypatch.setattr(self_text, "_BATCH", 2)
    assert torch.equal(sample(source, 5, 24, "a"), together)
    assert not torch.equal(sample(source, 5, 24, "b"), together)
    assert together.dtype == torch.int64
    assert together.shape == (5, 24)


def test_in_the_dtype_of_this_machine_the_same_twice_and_no_global_state(tmp_path: Path) -> None:
    source = open_source(str(tiny_model("llama", tmp_path)))
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    first = sample(source, 2, 16, "a")
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    torch.manual_seed(5)
    with as_on_a_gpu():
        assert torch.equal(sample(source, 2, 16, "a"), first)


def test_first_tokens_are_spread_over_the_vocabulary_without_special_tokens(tmp_path: Path) -> None:
    first = sample(open_source(str(tiny_model("llama", tmp_path))), 400, 1, "a")[:, 0]
    assert first.min() >= len(SPECIAL)
    assert first.max() < len(SPECIAL) + 256  # rows beyond the tokenizer stand for nothing
    assert len(set(first.tolist())) > 150


def without_special_tokens(model: Path) -> Path:
    """Its config and tokenizer name no begin, end or padding."""
    for file, fields in (
        ("config.json", ("bos_token_id", "eos_token_id", "pad_token_id")),
        ("tokenizer_config.json", ("bos_token", "eos_token", "pad_token")),
    ):
        described = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(described | dict.fromkeys(fields)))
    return model


def test_without_an_end_token_texts_go_on(tmp_path: Path) -> None:
    source = open_source(str(without_special_tokens(tiny_model("llama", tmp_path))))
    assert source.tokenizer().eos_token_id is None
    ids = sample(source, 3, 24, "a")
    assert ids.shape == (3, 24) and int(ids.max()) < 320


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: n for n, token in enumerate(SPECIAL)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="the tokenizer has only special tokens"):
        sample(open_source(str(model)), 2, 16, "a")


def test_a_model_that_does_not_fit_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(tiny_model("llama", tmp_path)))
    monkeypatch.setattr(self_text, "free_memory", lambda _: 1000)
    with pytest.raises(ResourceError, match=r"sampling text from the model needs .* GB") as caught:
        sample(source, 2, 16, "a")
    assert "--data" in str(caught.value.hint)

"""Begin tokens: windows begin as the tokenizer begins a text, or as `bos` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from qcli.data import generated
from qcli.data.begin import begin_tokens
from qcli.data.tokens import TokenRequest, calibration_tokens, evaluation_tokens
from qcli.models.open import ModelSource, open_source
from qcli.utils.errors import UsageError
from tests.quantizing import write_text
from tests.tiny import tiny_model, with_bos

BOS, END = 0, 1


@pytest.fixture
def silent(tmp_path: Path) -> ModelSource:
    """A model whose tokenizer adds no begin token, though it has one."""
    return open_source(str(tiny_model("llama", tmp_path)))


@pytest.fixture
def begins(tmp_path: Path) -> ModelSource:
    """A model whose tokenizer puts its begin token before every text."""
    return open_source(str(with_bos(tiny_model("llama", tmp_path))))


def ids_of(source: ModelSource, text: Path) -> torch.Tensor:
    return torch.tensor(source.tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"])


def test_auto_is_what_the_tokenizer_does(silent: ModelSource, begins: ModelSource) -> None:
    assert [begin_tokens(source, "auto") for source in (silent, begins)] == [[], [BOS]]
    assert [begin_tokens(source, True) for source in (silent, begins)] == [[BOS], [BOS]]
    assert [begin_tokens(source, False) for source in (silent, begins)] == [[], []]


def test_every_token_before_the_text_belongs_to_the_beginning(tmp_path: Path) -> None:
    """Tokenizers of GLM put two there; what comes behind the text does not count."""
    folder = tiny_model("llama", tmp_path)
    tokenizer = open_source(str(folder)).tokenizer()
    template = processors.TemplateProcessing(
        single="<pad> <s> $A </s>", pair="$A $B", special_tokens=[("<pad>", 2), ("<s>", BOS), ("</s>", END)]
    )
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    source = open_source(str(folder))
    assert begin_tokens(source, "auto") == [2, BOS]
    tokens = evaluation_tokens(str(write_text(tmp_path)), source, window=8, max_windows=3)
    assert (tokens.ids[:, :2].tolist(), tokens.begin) == ([[2, BOS]] * 3, 2)
    with pytest.raises(UsageError, match="windows of 2 tokens have no room for text behind 2 begin tokens"):
        evaluation_tokens(str(write_text(tmp_path)), source, window=2)


def test_a_tokenizer_without_a_begin_token_is_refused(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": None}))
    source = open_source(str(folder))
    assert begin_tokens(source, "auto") == []
    with pytest.raises(UsageError, match=r"bos is true, but its tokenizer has no begin token") as caught:
        begin_tokens(source, True)
    assert "bos: auto" in str(caught.value.hint)


def test_evaluation_windows_follow_each_other_behind_begin_tokens(begins: ModelSource, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    ids, tokens = ids_of(begins, text), evaluation_tokens(str(text), begins, window=100)
    assert (tokens.begin, tokens.bos) == (1, True)
    assert tokens.ids[:, 0].tolist() == [BOS] * len(tokens.ids)
    assert tokens.ids[:, 1:].flatten().tolist() == ids[: len(ids) // 99 * 99].tolist()
    without = evaluation_tokens(str(text), begins, window=100, bos=False)
    assert without.ids.flatten().tolist() == ids[: len(ids) // 100 * 100].tolist()
    assert not without.bos


def test_calibration_windows_begin_and_keep_apart(begins: ModelSource, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    ids = ids_of(begins, text)
    tokens = calibration_tokens(TokenRequest(str(text), 8, 32, seed=1, held_out=2, validation=2), begins)
    assert (tokens.ids.shape, tokens.begin) == ((10, 32), 1)
    assert tokens.ids[:, 0].tolist() == [BOS] * 10
    places = [int((ids.unfold(0, 31, 1) == window[1:]).all(1).nonzero()[0]) for window in tokens.ids]
    assert all(abs(places[i] - other) >= 31 for i in (6, 7, 8, 9) for other in places[:6])


def test_the_same_windows_where_nothing_is_added(silent: ModelSource, tmp_path: Path) -> None:
    text = str(write_text(tmp_path))
    for auto, never in (
        (evaluation_tokens(text, silent, window=40), evaluation_tokens(text, silent, window=40, bos=False)),
        *(
            (
                calibration_tokens(TokenRequest(data, 3, 24, seed=1), silent),
                calibration_tokens(TokenRequest(data, 3, 24, seed=1, bos=False), silent),
            )
            for data in (text, "self")
        ),
    ):
        assert torch.equal(auto.ids, never.ids) and not auto.bos


@pytest.mark.parametrize("end", [END, BOS], ids=["an end token", "one token for both"])
def test_generated_documents_all_begin(end: int, begins: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second token is an end token: each is followed by a begin token and a fresh start."""
    monkeypatch.setattr(generated, "_end_tokens", lambda *_: [end, *range(3, 160)])
    monkeypatch.setattr(generated, "_start_tokens", lambda *_: [300])
    ids = generated.sample(begins, 3, 40, "seed", [BOS])
    assert ids[:, :2].tolist() == [[BOS, 300]] * 3
    ended = (ids[:, :-2] < 160) & (ids[:, :-2] != BOS)
    assert ended.any()
    assert (ids[:, 1:-1][ended] == BOS).all() and (ids[:, 2:][ended] == 300).all()


def test_windows_of_a_folder_begin_as_they_do(begins: ModelSource, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folders = {}
    for bos in (True, False):
        folders[bos] = tmp_path / str(bos)
        folders[bos].mkdir()
        tokens = calibration_tokens(TokenRequest(str(write_text(tmp_path)), 4, 16, seed=0, bos=bos), begins)
        save_file({"ids": tokens.ids}, folders[bos] / "tokens.safetensors")
        for asked in ("auto", bos):
            read = calibration_tokens(TokenRequest(str(folders[bos]), 1, 2, seed=0, bos=asked), begins)
            assert torch.equal(read.ids, tokens.ids) and read.bos is bos
        cut = evaluation_tokens(str(folders[bos]), begins, window=8)
        assert torch.equal(cut.ids, tokens.ids[:, :8]) and cut.bos is bos
    with pytest.raises(UsageError, match="its windows begin with no begin token, bos is true"):
        calibration_tokens(TokenRequest(str(folders[False]), 1, 2, seed=0, bos=True), begins)
    with pytest.raises(UsageError, match="its windows begin with a begin token, bos is false"):
        evaluation_tokens(str(folders[True]), begins, window=8, bos=False)

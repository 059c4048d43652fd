"""Loading whole models, and generating from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qcli.inference import generate
from qcli.inference.generate import CONTEXT, END, LENGTH, Generator, Sampling
from qcli.inference.linear import QuantLinear
from qcli.inference.load import backend_counts, load_model, loaded_bytes, tensor_bytes
from qcli.models.families import FAMILIES
from qcli.models.open import open_source
from qcli.models.source import ModelSource
from qcli.utils.errors import UsageError, VerificationError
from tests.quantizing import TOKENS, logits, run, write_text
from tests.tiny import VARIANTS, tiny_model

CPU = torch.device("cpu")
PROMPT = [10, 200, 31, 47, 5, 90, 91, 17, 44, 23, 8, 300]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelSource, Any]:
    source = open_source(str(folder))
    return source, load_model(source, CPU, dtype)


def tokens(generator: Generator, prompt: list[int], **options: Any) -> list[int]:
    return generator.generate(prompt, Sampling(**{"max_new_tokens": 8, **options}), lambda _: None).tokens


def recomputed(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation without a cache."""
    sequence = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            sequence.append(int(model(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in FAMILIES), *VARIANTS])
def test_the_cache_changes_nothing(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Not across a sliding window either, nor in a second call that goes on from the first."""
    source, model = loaded(tiny_model(family, tmp_path, **changes))
    generator = Generator(source, model, source.tokenizer())
    first = tokens(generator, PROMPT)
    assert first == recomputed(model, PROMPT, 8)
    longer = [*PROMPT, *first, 60, 61, 62]
    assert tokens(generator, longer) == recomputed(model, longer, 8)
    assert tokens(generator, PROMPT) == first


def test_what_is_in_the_cache_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = loaded(tiny_model("llama", tmp_path))
    generator = Generator(source, model, source.tokenizer())
    lengths: list[int] = []
    forward = model.forward

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model, "forward", counted)
    first = tokens(generator, PROMPT, max_new_tokens=4)
    assert lengths == [len(PROMPT), 1, 1, 1]
    tokens(generator, [*PROMPT, *first, 60], max_new_tokens=1)
    assert lengths[4:] == [2]  # the last of the first answer, and the new one
    tokens(generator, [11, *PROMPT], max_new_tokens=1)
    assert lengths[5:] == [len(PROMPT) + 1]


def test_a_cache_that_has_to_grow_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = loaded(tiny_model("llama", tmp_path))
    expected = recomputed(model, PROMPT, 40)
    monkeypatch.setattr(generate, "_ROOM", 1)
    assert tokens(Generator(source, model, source.tokenizer()), PROMPT, max_new_tokens=40) == expected


def test_seeds_choose_the_text(tmp_path: Path) -> None:
    source, model = loaded(tiny_model("llama", tmp_path))
    generator = Generator(source, model, source.tokenizer())
    state = torch.get_rng_state()
    drawn = {seed: tokens(generator, PROMPT, temperature=1.0, seed=seed) for seed in range(4)}
    assert tokens(generator, PROMPT, temperature=1.0, seed=2) == drawn[2]
    assert len({*map(tuple, drawn.values())}) == 4
    greedy = tokens(generator, PROMPT)
    assert tokens(generator, PROMPT, temperature=1e-6) == greedy
    assert tokens(generator, PROMPT, temperature=2.0, top_p=1e-6) == greedy
    assert torch.equal(torch.get_rng_state(), state)


def test_the_end_of_text_of_length_and_of_context(tmp_path: Path) -> None:
    source, model = loaded(tiny_model("llama", tmp_path, max_position_embeddings=20))
    found = tokens(Generator(source, model, source.tokenizer()), PROMPT)
    stop = found[3]
    generator = Generator(source, model, source.tokenizer(), {stop})
    result = generator.generate(PROMPT, Sampling(100), lambda _: None)
    assert (result.stopped, result.tokens) == (END, found[: found.index(stop)])
    result = generator.generate(PROMPT, Sampling(1), lambda _: None)
    assert (result.stopped, result.tokens, result.tokens_per_second) == (LENGTH, found[:1], None)
    result = Generator(source, model, source.tokenizer()).generate(PROMPT, Sampling(100), lambda _: None)
    assert (result.stopped, len(result.tokens)) == (CONTEXT, 20 - len(PROMPT))
    for prompt, message in (([], "empty"), ([1] * 20, "20 tokens, the model's context 20"), ([1, 320], "id 320")):
        with pytest.raises(UsageError, match=message):
            generator.generate(prompt, Sampling(1), lambda _: None)


def test_logits_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    source, model = loaded(tiny_model("llama", tmp_path))
    model.lm_head.weight[7] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(VerificationError, match="not finite"):
            tokens(Generator(source, model, source.tokenizer()), PROMPT, temperature=temperature)


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"method__name": "rtn", "method__bits": 3}),
    ("gpt2", {"method__name": "rtn", "method__bits": 3}),
    ("qwen2", {"method__name": "rtn", "method__bits": 2, "low_rank__rank": 4}),
    ("llama", {"method__name": "rtn", "method__bits": 4, "activations__bits": 8}),
    ("llama", {"method__name": "onebit", "grouped": False}),
    ("llama", {"method__name": "dbllm"}),
    ("llama", {"method__name": "full-precision", "activations__bits": 4, "grouped": False}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "recipe"), METHODS)
def test_packed_layers_stay_packed_and_compute_what_transformers_does(
    family: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "q"
    run(tiny_model(family, tmp_path), out, write_text(tmp_path), **recipe)
    source, model = loaded(out)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits(out))
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == len(source.linears()) == sum(backend_counts(model, CPU, torch.float32).values())
    assert layers[0].name == source.linears()[0].name
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())  # rotary ones are not stored
    assert loaded_bytes(source, torch.float32) <= tensor_bytes(model) <= loaded_bytes(source, torch.float32) + tables

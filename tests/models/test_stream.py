"""The streamed forward pass is the model's own, with one block in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.operations import Counting
from qcli.models import stream as module
from qcli.models.families import FAMILIES
from qcli.models.open import open_source
from qcli.models.stream import ModelStream, batches
from qcli.utils.errors import UsageError
from qcli.utils.stored_batches import BatchMemory
from tests.determinism import as_on_a_gpu
from tests.tiny import VARIANTS, tiny_model

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def streamed(path: Path, dtype: torch.dtype = torch.float32) -> ModelStream:
    return ModelStream(open_source(str(path)), device=torch.device("cpu"), dtype=dtype)


def run(stream: ModelStream, tokens: Tensor = TOKENS) -> Tensor:
    return stream.logits_of(tokens)


def whole(path: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_streamed_forward_is_the_whole_models(model_type: str, tied: bool, tmp_path: Path) -> None:
    path = tiny_model(model_type, tmp_path, tie_word_embeddings=tied)
    with as_on_a_gpu():  # OPT counts positions in floating point
        logits = run(streamed(path))
    assert logits.std() > 0.1
    assert torch.equal(logits, whole(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        *VARIANTS,
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
        ("opt", {"word_embed_proj_dim": 32}),
    ],
    ids=str,
)
def test_variants_of_a_family_too(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    path = tiny_model(model_type, tmp_path, **overrides)
    with as_on_a_gpu():
        logits = run(streamed(path))
    assert torch.equal(logits, whole(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "nope"),
        ("pad_token_id", 10**30),
        ("rope_parameters", {"rope_type": {"a": 1}}),
        ("rope_parameters", {"rope_type": 0}),
        ("rope_parameters", {"rope_type": "nope", "rope_theta": 10000.0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
        ("head_dim", 0),
        ("head_dim", -1),
        ("intermediate_size", 10**30),
        ("num_hidden_layers", 10**30),
        ("num_attention_heads", 0),
        ("max_position_embeddings", "x"),
        ("text_config", [1]),
        ("attn_implementation", "nope"),
    ],
    ids=str,
)
def test_a_config_that_transformers_cannot_build_is_one_line(field: str, value: Any, tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UsageError, match=r"config\.json|cannot build this model|shape") as raised:
        run(streamed(path))
    assert "\n" not in raised.value.message


def test_a_lack_of_memory_is_not_the_configs_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "quantizable_skeleton", starve)
    with pytest.raises(RuntimeError, match="out of memory"):
        streamed(tiny_model("llama", tmp_path))


def test_bfloat16_too(tmp_path: Path) -> None:
    path = tiny_model("gemma3_text", tmp_path)
    logits = run(streamed(path, torch.bfloat16))
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, whole(path, torch.bfloat16))


def test_batches_of_other_shapes_have_calls_of_their_own(tmp_path: Path) -> None:
    stream = streamed(tiny_model("bloom", tmp_path))
    both = run(stream)
    torch.testing.assert_close(run(stream, TOKENS[:1]), both[:1])
    torch.testing.assert_close(run(stream, TOKENS[:, :7]), both[:, :7])
    assert stream.calls(1, 24) is stream.calls(1, 24)


def test_batches_advance_in_place_as_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = streamed(tiny_model("llama", tmp_path))
    monkeypatch.setattr(module, "BATCH_TOKENS", 24 + 23)
    parts = batches(TOKENS)
    assert [part.shape for part in parts] == [(1, 24), (1, 24)]
    hidden = BatchMemory(stream.device).store(map(stream.embed, parts))
    for index, expected in enumerate(stream.hidden_states(TOKENS)):
        stream.advance(stream.load_block(index), index, hidden)
        torch.testing.assert_close(torch.cat(hidden.waiting()), expected)
    torch.testing.assert_close(torch.cat([stream.logits(batch) for batch in hidden]), run(stream))
    assert batches(TOKENS[:0]) == ()


@pytest.mark.parametrize("model_type", ["llama", "bloom", "gemma2"])
def test_embedding_and_head_do_not_wait_for_the_device(model_type: str, tmp_path: Path) -> None:
    """Only making masks does, once for each shape of batches."""
    stream = streamed(tiny_model(model_type, tmp_path))
    with Counting() as counting:
        hidden = stream.embed(TOKENS)
        stream.logits(hidden)
    assert counting.now().synchronizations == 0
    assert stream.config._attn_implementation in ("sdpa", "eager")


def test_only_what_lies_outside_the_blocks_has_memory(tmp_path: Path) -> None:
    stream = streamed(tiny_model("llama", tmp_path, num_hidden_layers=3))
    block = stream.load_block(1)
    assert not any(parameter.is_meta for parameter in block.parameters())
    real = {name for name, value in stream.model.named_parameters() if not value.is_meta}
    assert real == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert stream.load_block(1) is not block
    again = stream.load_block(1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in block.state_dict().items())
    assert not any(parameter.requires_grad for parameter in (*block.parameters(), *stream.model.parameters()))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_blocks_run_without_the_vocabulary(model_type: str, tied: bool, tmp_path: Path) -> None:
    path = tiny_model(model_type, tmp_path, tie_word_embeddings=tied)
    stream, other = streamed(path), streamed(path)
    expected = run(stream)
    hidden = stream.embed(TOKENS)
    other.drop_vocabulary()
    vocabulary = other.model.get_input_embeddings(), other.model.get_output_embeddings()
    assert all(parameter.is_meta for module in vocabulary for parameter in module.parameters())
    for index in range(other.n_blocks):
        hidden = other.run_block(other.load_block(index), index, hidden)
    stream.drop_embedding()
    assert stream.model.get_input_embeddings().weight.is_meta == (not tied)
    assert torch.equal(stream.logits(hidden), expected)


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    path = tiny_model("gemma3_text", tmp_path)
    before = torch.random.get_rng_state()
    run(streamed(path))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("model_type", "linear"), [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj")])
def test_weights_are_out_by_in_whatever_the_storage(model_type: str, linear: str, tmp_path: Path) -> None:
    stream = streamed(tiny_model(model_type, tmp_path))
    module = stream.load_block(0).get_submodule(linear)
    shape = next(layer.shape for layer in stream.source.linears() if layer.name.endswith(linear))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert ModelStream.weight_of(module).shape == shape
    ModelStream.set_weight(module, weight)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1))
    bias: Any = module.bias
    torch.testing.assert_close(module(x), nn.functional.linear(x, weight, bias))


def test_a_stored_head_is_used_even_if_the_config_says_tied(
    tmp_path: Path,
) -> None:
    path = tiny_model("llama", tmp_path, tie_word_embeddings=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(run(streamed(path)), whole(path))


def test_a_tied_checkpoint_may_hold_the_head_instead_of_the_embedding(tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    expected = run(streamed(path))
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert torch.equal(run(streamed(path)), expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing tensors model.norm.weight"),
        (lambda tensors: tensors.update({"model.extra": torch.ones(2)}), "unexpected tensors model.extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(2)}),
            "another shape than config.json implies: model.norm",
        ),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_weights_that_do_not_fit_the_config_are_refused(change: Any, problem: str, tmp_path: Path) -> None:
    path = tiny_model("llama", tmp_path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=problem):
        streamed(path)


@pytest.mark.parametrize("tied", [False, True])
def test_equal_models_share_what_lies_outside_their_blocks(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, tie_word_embeddings=tied)
    one, other, changed = (streamed(model) for _ in range(3))
    with torch.no_grad():
        changed.model.base_model.norm.weight += 1
    tokens = torch.arange(8)[None]
    expected = changed.logits_of(tokens)
    for stream in (other, changed):
        stream.share(one)
        assert stream.model.get_input_embeddings().weight is one.model.get_input_embeddings().weight
        assert stream.model.get_output_embeddings().weight is one.model.get_output_embeddings().weight
    assert other.model.base_model.norm.weight is one.model.base_model.norm.weight
    assert torch.equal(changed.logits_of(tokens), expected)
    one.drop_vocabulary()
    assert torch.equal(changed.logits_of(tokens), expected)

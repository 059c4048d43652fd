"""Packed models are used as any other: compiled, copied, moved, offloaded, generated from. On GPUs: test_cuda.py."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import qcli  # noqa: F401
from qcli.inference.linear import QuantLinear
from tests.quantizing import TOKENS, run, write_text
from tests.tiny import tiny_model

PROMPT = torch.tensor([[10, 200, 31, 47, 5, 90, 91, 17]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with layers of several formats."""
    where = tmp_path_factory.mktemp("packed")
    overrides = [
        {"match": "*.q_proj", "method": {"name": "rtn", "bits": 3, "group_size": 16, "zero_point": "float"}},
        {"match": "*.o_proj", "method": {"name": "onebit", "bits": 1}},
        {"match": "*.gate_proj", "method": {"name": "dbllm", "bits": 2, "group_size": 32}},
    ]
    run(tiny_model("llama", where), where / "out", write_text(where), method__name="rtn", overrides=overrides)
    return where / "out"


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS.to(model.device)).logits
    return found


def layers(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_state_is_that_of_the_files(folder: Path) -> None:
    model = loaded(folder)
    stored, state = on_disk(folder), model.state_dict()
    assert len(layers(model)) == 14 and {layer.format.name for layer in layers(model).values()} == {
        "affine",
        "sign",
        "dual-binary",
    }
    packed = {f"{name}.{suffix}" for name, layer in layers(model).items() for suffix in layer.tensors}
    assert packed <= stored.keys()
    for name in packed:
        assert state[name].dtype == stored[name].dtype and torch.equal(state[name], stored[name])


def test_loading_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fills the weights of linear layers that it does not know with noise before it loads them."""
    monkeypatch.setattr(QuantLinear, "quantized", property(lambda _: pytest.fail("a weight is decoded")))
    loaded(folder)


def test_a_state_loads_into_another_model(folder: Path) -> None:
    one, other = loaded(folder), loaded(folder)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    other.load_state_dict(one.state_dict())
    for name, layer in layers(one).items():
        assert all(torch.equal(value, layers(other)[name].tensors[key]) for key, value in layer.tensors.items())


def test_copies_and_pickles(folder: Path) -> None:
    model = loaded(folder)
    expected = logits(model)
    copies: list[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        assert torch.equal(logits(other), expected)
        first, again = (layers(which)["model.layers.0.mlp.up_proj"].tensors for which in (model, other))
        assert first["weight_packed"].data_ptr() != again["weight_packed"].data_ptr()


def test_moving_keeps_the_stored_dtypes(folder: Path) -> None:
    model = loaded(folder)
    expected, stored = logits(model), on_disk(folder)
    for moved in (model.to("cpu", torch.bfloat16), model.bfloat16()):
        assert logits(moved).dtype == torch.bfloat16
        relative = (logits(moved).float() - expected).norm() / expected.norm()
        assert float(relative) < 0.05
    for name, layer in layers(model).items():
        assert layer.compute_dtype == torch.bfloat16
        assert all(torch.equal(value, stored[f"{name}.{suffix}"]) for suffix, value in layer.tensors.items())
    meta = copy.deepcopy(model).to("meta")
    assert all(buffer.is_meta for layer in layers(meta).values() for buffer in layer.buffers())


def test_autocast_computes_in_its_dtype(folder: Path) -> None:
    model = loaded(folder)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 64)
        assert layers(model)["model.layers.0.mlp.up_proj"](x).dtype == torch.bfloat16
        found = logits(model)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05


def test_a_static_cache_generates_the_same(folder: Path) -> None:
    model = loaded(folder)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(PROMPT, **options)
    static = model.generate(PROMPT, cache_implementation="static", **options)
    assert dynamic.shape == (1, 20) and torch.equal(dynamic, static)


@pytest.mark.parametrize("where", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_maps(folder: Path, where: Any) -> None:
    assert torch.equal(logits(loaded(folder, device_map=where).to("cpu")), logits(loaded(folder)))


def test_layers_that_do_not_fit_are_read_from_disk(folder: Path, tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
    places["model.layers.1"] = "disk"
    model = loaded(folder, device_map=places, offload_folder=tmp_path, offload_buffers=True)
    assert torch.equal(logits(model), logits(loaded(folder)))
    assert model.model.layers[1].mlp.up_proj.weight_packed.is_meta
    assert not model.model.layers[0].mlp.up_proj.weight_packed.is_meta


@pytest.mark.slow
def test_models_compile_to_one_graph(folder: Path) -> None:
    model = loaded(folder)
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


@pytest.mark.slow
def test_inductor_compiles_around_packed_layers(folder: Path) -> None:
    mlp: Any = loaded(folder).model.layers[0].mlp
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled: Any = torch.compile(mlp, fullgraph=True)
        torch.testing.assert_close(compiled(x), mlp(x))


@pytest.mark.slow
def test_a_compiled_decode_step_generates_the_same(folder: Path) -> None:
    """With a static cache, as transformers compiles `generate` on GPUs."""
    model = loaded(folder)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(PROMPT, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(PROMPT, cache_implementation="static", **options), expected)

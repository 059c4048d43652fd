"""Bits chosen by measurement: what is predicted, what is chosen, what is shipped, and that it can be repeated."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from qcli.algorithms.layer_group import LinearGroup
from qcli.core.weight import QuantizedWeight
from qcli.export.pack import pack
from qcli.models.families import Linear
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.plan import make_plan
from qcli.quantization.quantize import quantize
from qcli.quantization.search_space import mixed_recipe, search_space
from qcli.quantization.sensitivity import sensitivities
from qcli.recipe.assign import assign
from qcli.recipe.load import load_recipe
from qcli.recipe.recipe import Recipe
from qcli.utils.errors import QcliError, UsageError
from tests.tiny import tiny_model

AUTO = {"method.bits": "auto", "method.target_bpw": 3.8, "method.group_size": 32, "method.name": "rtn"}
LAYERS = [
    Linear(f"model.layers.{block}.mlp.{name}", block, 0, shape)
    for block in range(3)
    for name, shape in (("up_proj", (128, 64)), ("down_proj", (64, 128)))
]


def recipe(**fields: Any) -> Recipe:
    return load_recipe(None, {"model": "m", **AUTO, **fields})


@pytest.fixture
def ready(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400)))
    model = tiny_model("llama", tmp_path)
    calibration = {"calibration.data": str(text), "calibration.samples": 12, "calibration.seq_len": 32}
    return {"model": str(model), **calibration}


def test_predictions_follow_what_quantizing_one_layer_does(tmp_path: Path) -> None:
    source = open_source(str(tiny_model("llama", tmp_path)))
    stream = ModelStream(source, device=torch.device("cpu"), dtype=torch.float32)
    space = search_space(recipe(), source.linears())
    tokens = torch.randint(3, 320, (16, 64), generator=torch.Generator().manual_seed(0))
    losses = sensitivities(space, stream, tokens, lambda block, find: find(), lambda *_: None)
    blocks = [stream.load_block(index) for index in range(stream.n_blocks)]

    def predictions() -> torch.Tensor:
        forwards = [partial(stream.run_block, block, index) for index, block in enumerate(blocks)]
        return stream.logits_of(tokens, forwards).log_softmax(-1)

    predicted, true = [], []
    with torch.no_grad():
        before = predictions()
        for layer in space.layers:
            module = blocks[layer.block].get_submodule(layer.path)
            weight = stream.weight_of(module).clone()
            for option, method in enumerate(space.candidates):
                if method.format.bits == 2:  # no small change any more
                    continue
                stream.set_weight(module, _rounded(method, weight).dense())
                kl = torch.nn.functional.kl_div(predictions(), before, log_target=True, reduction="sum")
                true.append(float(kl) / tokens.numel())
                predicted.append(losses[layer.name][option])
            stream.set_weight(module, weight)
    assert spearmanr(predicted, true).statistic > 0.9
    ratios = torch.tensor(predicted) / torch.tensor(true)
    assert 0.5 < float(ratios.median()) < 2


def _rounded(method: Any, weight: torch.Tensor) -> QuantizedWeight:
    (solution,) = method.quantize(LinearGroup({"x": weight})).values()
    return solution.weight  # type: ignore[no-any-return]


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_resolved_recipes_say_what_was_chosen(picked: list[int]) -> None:
    override = {"match": "*.1.mlp.up_proj", "method": {"bits": 8}}
    space = search_space(recipe(overrides=[override]), LAYERS)
    chosen = {layer.name: picked[i] % len(space.candidates) for i, layer in enumerate(space.layers)}
    assigned = assign(space.recipe_of(chosen), LAYERS)
    assert {name: assigned[name] for name in chosen} == {name: space.candidates[n] for name, n in chosen.items()}
    fixed = assigned["model.layers.1.mlp.up_proj"]
    assert fixed is not None and fixed.format.bits == 8 and len(assigned) == len(chosen) + 1


def test_layers_that_engines_compute_as_one_are_alike(ready: dict[str, Any], tmp_path: Path) -> None:
    wanted = recipe(**ready, **{"method.fused": True})
    assert load_recipe(None, wanted.to_dict()) == wanted
    result = quantize(wanted, tmp_path / "out")
    assert result.allocation is not None and result.allocation["shipped"] == "allocation"
    bits = {layer.name: layer.spec["bits"] for layer in result.layers}
    assert len(set(bits.values())) > 1
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert len({bits[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
        assert bits[f"{mlp}.gate_proj"] == bits[f"{mlp}.up_proj"]
    pack(result.out, tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    layers = open_source(ready["model"]).linears()
    methods = assign(mixed_recipe(wanted, layers), layers).values()
    assert set(methods) == set(search_space(wanted, layers).candidates)


@pytest.mark.parametrize("groups", [32, "auto"])
def test_automatic_recipes_are_written_as_they_were_said(groups: Any, tmp_path: Path) -> None:
    before = recipe(**{"method.group_size": groups})
    file = tmp_path / "recipe.yaml"
    file.write_text(before.to_yaml())
    assert load_recipe(file, {}) == before
    assert before.to_dict()["method"]["bits"] == "auto"
    space = search_space(before, LAYERS)
    sizes = [method.model_dump()["group_size"] for method in space.candidates]
    assert set(sizes) == ({32} if groups == 32 else {32, 64, 128})
    narrow = space.sizes["model.layers.0.mlp.up_proj"]
    assert [bits is None for bits in narrow] == [size == 128 for size in sizes], "it is 64 wide"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"method.target_bpw": None}, "method.target_bpw: required"),
        ({"method.fused": "yes"}, "--fused: must be true or false"),
        ({"method.bits": 3, "method.target_bpw": None, "method.fused": True}, "fused: is for bits: auto"),
        ({"method.bits": 3}, "--target-bpw: is for bits: auto"),
        ({"method.bits": 3, "method.target_bpw": None, "method.group_size": "auto"}, "--group-size: auto goes with"),
        ({"method.target_bpw": 2.2}, r"--target-bpw: must be within 2\.56\d* and 8\.75, the range of rtn"),
        ({"method.target_bpw": 9}, "--target-bpw: must be within"),
        ({"method.name": "onebit", "method.group_size": None}, "--bits: auto: onebit has only one width"),
        ({"overrides": [{"match": "*", "method": {"symmetric": True}}]}, "must set bits"),
        ({"overrides": [{"match": "*", "dense": True}]}, "overrides take every layer"),
    ],
)
def test_what_cannot_be_chosen_is_told(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        search_space(recipe(**fields), LAYERS)


def test_group_sizes_that_a_layer_does_not_fit_leave_the_manifest_json(ready: dict[str, Any], tmp_path: Path) -> None:
    out = quantize(recipe(**ready, **{"method.group_size": "auto"}), tmp_path / "out").out

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    manifest = json.loads((out / "qcli.manifest.json").read_text(), parse_constant=refuse)
    options = manifest["allocation"]["sensitivity"]["model.layers.0.mlp.up_proj"]
    assert None in options.values() and any(loss is not None for loss in options.values())


@pytest.mark.slow
def test_the_better_one_is_shipped_and_its_recipe_gives_it_again(
    ready: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(**ready, **{"method.name": "gptq-like"})
    result = quantize(wanted, tmp_path / "out")
    story = result.allocation
    assert story is not None and len(story["trials"]) == 2
    assert result.plan.bits_per_weight == pytest.approx(story["trials"][story["shipped"]]["bits_per_weight"])
    assert all(trial["bits_per_weight"] <= 3.8 for trial in story["trials"].values())
    assert story["shipped"] == min(story["trials"], key=lambda name: story["trials"][name]["measured_kl"])
    recorded = Manifest.read(result.out).allocation
    assert recorded is not None and asdict(recorded) == story
    assert not (tmp_path / "out.partial").exists()
    again = load_recipe(result.out / "recipe.yaml", {})
    assert again.allocation is None and again.calibration.samples == 8
    quantize(again, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(result.out)

    monkeypatch.setattr("qcli.quantization.allocate.compare", _stop)
    with pytest.raises(QcliError, match="stopped"):
        quantize(wanted, tmp_path / "resumed")
    monkeypatch.undo()
    monkeypatch.setattr("qcli.quantization.sensitivity._predicted", _stop)
    assert bytes_of(quantize(wanted, tmp_path / "resumed").out) == bytes_of(result.out)


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _stop(*_: Any, **__: Any) -> Any:
    raise QcliError("stopped")


def test_a_bad_allocation_is_not_shipped(
    ready: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcli.quantization.allocate.minimize_loss", lambda losses, costs, budget: [0] * len(losses))
    result = quantize(recipe(**ready), tmp_path / "out")
    assert result.allocation is not None and result.allocation["shipped"] == "uniform"
    assert make_plan(result.plan.recipe).bits_per_weight == pytest.approx(3.59, abs=0.05)
    assert {layer.spec["bits"] for layer in result.layers} == {3}


def test_samples_are_needed_to_judge(ready: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hold out 4 of 4 samples: none is left"):
        quantize(recipe(**{**ready, "calibration.samples": 4}), tmp_path / "out")
    with pytest.raises(UsageError, match="a calibration folder is used whole"):
        quantize(recipe(**{**ready, "calibration.data": str(tmp_path)}), tmp_path / "out")

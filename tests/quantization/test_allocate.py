"""Bits chosen by measurement: predicted and measured losses, the shipped trial, and its repetition."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from qcli.algorithms.layer_group import LinearGroup
from qcli.core.weight import QuantizedWeight
from qcli.export.pack import pack
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
from qcli.utils.errors import QcliError, StateError, UsageError
from tests.determinism import as_on_a_gpu
from tests.tiny import tiny_model

AUTO = {"method.bits": "auto", "method.target_bpw": 3.8, "method.group_size": 32, "method.name": "rtn"}


def recipe(**fields: Any) -> Recipe:
    return load_recipe(None, {"model": "m", **AUTO, **fields})


@pytest.fixture
def ready(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400)))
    model = tiny_model("llama", tmp_path)
    calibration = {"calibration.data": str(text), "calibration.samples": 12, "calibration.seq_len": 32}
    return {"model": str(model), **calibration}


def test_predicted_losses_follow_measured_ones(tmp_path: Path) -> None:
    source = open_source(str(tiny_model("llama", tmp_path)))
    stream = ModelStream(source, device=torch.device("cpu"), dtype=torch.float32)
    space = search_space(recipe(), source.linears())
    tokens = torch.randint(3, 320, (16, 64), generator=torch.Generator().manual_seed(0))
    with as_on_a_gpu():
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


def test_experts_that_no_token_reaches_count_as_the_least_that_one_does(tmp_path: Path) -> None:
    source = open_source(str(tiny_model("qwen3_moe", tmp_path, num_local_experts=48)))
    stream = ModelStream(source, device=torch.device("cpu"), dtype=torch.float32)
    space = search_space(recipe(), source.linears())
    tokens = torch.randint(3, 320, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = sensitivities(space, stream, tokens, lambda block, find: find(), lambda *_: None)
    rows = torch.tensor([losses[f"model.layers.1.mlp.experts.{n}.down_proj"] for n in range(48)])
    assert torch.isfinite(rows).all() and bool((rows > 0).all())
    idle = (rows == rows.amin(0)).all(1)
    assert 16 <= int(idle.sum()) < 48  # two of 48 experts for each of 16 tokens


def _rounded(method: Any, weight: torch.Tensor) -> QuantizedWeight:
    (solution,) = method.quantize(LinearGroup({"x": weight})).values()
    return solution.weight  # type: ignore[no-any-return]


def test_fused_layers_get_one_width(ready: dict[str, Any], tmp_path: Path) -> None:
    automatic = recipe(**ready, **{"method.fused": True})
    assert load_recipe(None, automatic.to_dict()) == automatic
    result = quantize(automatic, tmp_path / "out")
    assert result.allocation is not None and result.allocation["shipped"] == "allocation"
    bits = {layer.name: layer.spec["bits"] for layer in result.layers}
    assert len(set(bits.values())) > 1
    for block in range(2):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        assert len({bits[f"{attention}.{name}_proj"] for name in "qkv"}) == 1
        assert bits[f"{mlp}.gate_proj"] == bits[f"{mlp}.up_proj"]
    pack(result.out, tmp_path / "packed", format="compressed-tensors", shard_size=10**9, allow_refused=True)
    layers = open_source(ready["model"]).linears()
    methods = assign(mixed_recipe(automatic, layers), layers).values()
    assert set(methods) == set(search_space(automatic, layers).candidates)


def test_the_manifest_is_strict_json_where_a_layer_fits_no_candidate(ready: dict[str, Any], tmp_path: Path) -> None:
    out = quantize(recipe(**ready, **{"method.group_size": "auto"}), tmp_path / "out").out

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    manifest = json.loads((out / "qcli.manifest.json").read_text(), parse_constant=refuse)
    options = manifest["allocation"]["sensitivity"]["model.layers.0.mlp.up_proj"]
    assert None in options.values() and any(loss is not None for loss in options.values())


@pytest.mark.slow
def test_the_better_trial_is_shipped_and_its_recipe_repeats_it(
    ready: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic = recipe(**ready, **{"method.name": "gptq-like"})
    result = quantize(automatic, tmp_path / "out")
    story = result.allocation
    assert story is not None and len(story["trials"]) == 2
    assert result.plan.bits_per_weight == pytest.approx(story["trials"][story["shipped"]]["bits_per_weight"])
    assert all(trial["bits_per_weight"] <= 3.8 for trial in story["trials"].values())
    assert story["shipped"] == min(story["trials"], key=lambda name: story["trials"][name]["measured_kl"])
    recorded = Manifest.read(result.out).allocation
    assert recorded is not None and asdict(recorded) == story
    assert not (tmp_path / "out.partial").exists()
    places = {"model": automatic.model, "calibration.data": automatic.calibration.data}
    again = load_recipe(result.out / "recipe.yaml", places)
    assert again.allocation is None and again.calibration.samples == 8
    quantize(again, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(result.out)

    monkeypatch.setattr("qcli.quantization.allocate.compare", _stop)
    with pytest.raises(QcliError, match="stopped"):
        quantize(automatic, tmp_path / "resumed")
    monkeypatch.undo()
    monkeypatch.setattr("qcli.quantization.sensitivity._predicted", _stop)
    assert bytes_of(quantize(automatic, tmp_path / "resumed").out) == bytes_of(result.out)


def test_a_run_does_not_go_on_with_another_text(
    ready: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no text is named, and the hub was reached when the run began."""
    first, second = ready.pop("calibration.data"), tmp_path / "second.txt"
    second.write_text(Path(first).read_text().upper())
    monkeypatch.setattr("qcli.data.tokens.named", lambda _: first)
    monkeypatch.setattr("qcli.quantization.allocate.sensitivities", _stop)
    for _ in range(2):
        with pytest.raises(QcliError, match="stopped"):
            quantize(recipe(**ready), tmp_path / "out")
    monkeypatch.setattr("qcli.data.tokens.named", lambda _: str(second))
    with pytest.raises(StateError, match="auto gives other samples than when the run began"):
        quantize(recipe(**ready), tmp_path / "out")


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


def test_trials_need_held_out_samples(ready: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hold out 4 of 4 samples: none is left"):
        quantize(recipe(**{**ready, "calibration.samples": 4}), tmp_path / "out")
    with pytest.raises(UsageError, match="a calibration folder is used whole"):
        quantize(recipe(**{**ready, "calibration.data": str(tmp_path)}), tmp_path / "out")

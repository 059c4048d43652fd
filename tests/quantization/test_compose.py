"""Transforms, compensation, refinement and activations around a method, through the main verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qcli.data.tokens import TokenRequest, calibration_tokens
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.export.verify import verify
from qcli.models.open import open_source
from qcli.quantization.quantize import quantize
from qcli.quantization.result import Result
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UsageError
from tests.quantizing import in_pieces, logits, streamed
from tests.tiny import CONFIGS, VARIANTS, tiny_model

pytestmark = pytest.mark.slow

TEQ = "transforms=[{name: teq, steps: 6, lr: 0.02}]"
EVERYTHING = (TEQ, "low_rank.rank=2", "refine.steps=6", "activations.bits=8")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(600)))
    return file


def run(model: Path, out: Path, text: Path, *sets: str, **flags: Any) -> Result:
    given = {"model": str(model), "method.bits": 3, "method.group_size": 32}
    given |= {"calibration.data": str(text), "calibration.samples": 12, "calibration.seq_len": 32}
    recipe = load_recipe(None, given | flags, sets)
    return quantize(recipe, out)


def test_only_what_trains_holds_samples_apart(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    source = open_source(str(model))
    hashes = {
        held_out: calibration_tokens(TokenRequest(str(text), 60, 32, seed=0, held_out=held_out), source).sha256
        for held_out in (0, 4)
    }
    assert hashes[0] != hashes[4]
    for name, sets, held_out in (("plain", (), 0), ("trained", ("refine.steps=1",), 4)):
        found = run(model, tmp_path / name, text, *sets, **{"calibration.samples": 60})
        assert found.tokens_sha256 == hashes[held_out]


def loss(model: Path, out: Path, text: Path) -> float:
    found = evaluate(str(out), EvalOptions([str(text)], window=32, max_windows=16), baseline=str(model)).kl
    assert found is not None
    return found


@pytest.mark.parametrize(("model_type", "overrides"), [*((name, {}) for name in CONFIGS), *VARIANTS], ids=str)
def test_everything_at_once_on_every_family(
    model_type: str, overrides: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    model, out = tiny_model(model_type, tmp_path, **overrides), tmp_path / "out"
    result = run(model, out, text, *EVERYTHING)
    assert verify(out).layers == len(result.layers)
    computed, decoded = logits(out), streamed(out)  # sums in another order move some activations to the next code
    assert float((computed - decoded).norm() / decoded.norm()) < 0.01
    assert {what.split(" ", 2)[2] for what in result.training} == {"teq", "refine"}
    assert len(result.training) == 4
    for outcome in result.training.values():
        assert outcome["steps"] == 6
        assert outcome["stopped"] is None


@pytest.mark.parametrize(
    "sets",
    [
        ("refine.steps=40",),
        ("refine.steps=40", "refine.scope=linear"),
        ("low_rank.rank=4", "low_rank.weighted=false"),
        ("low_rank.rank=4",),
        ("transforms=[{name: teq, steps: 40, lr: 0.02}]",),
        ("transforms=[{name: teq, steps: 40, lr: 0.02, loss: kl}]",),
    ],
    ids=str,
)
def test_each_part_brings_rtn_closer_to_the_model(sets: tuple[str, ...], tmp_path: Path, text: Path) -> None:
    model, plain, better = tiny_model("llama", tmp_path), tmp_path / "plain", tmp_path / "better"
    run(model, plain, text, "method.name=rtn")
    run(model, better, text, "method.name=rtn", *sets)
    assert loss(model, better, text) < 0.9 * loss(model, plain, text)


def test_fewer_activation_bits_cost_more(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    losses = []
    for bits in (8, 4):
        out = tmp_path / f"a{bits}"
        run(model, out, text, "method.bits=8", f"activations.bits={bits}")
        losses.append(loss(model, out, text))
    assert losses[1] > 3 * losses[0]


def test_calibration_sees_quantized_activations(tmp_path: Path, text: Path) -> None:
    """The Hessian is that of the inputs that layers will really get, whichever layer of a group stays dense."""
    model, plain, seen = tiny_model("llama", tmp_path), tmp_path / "plain", tmp_path / "seen"
    sets = ("overrides=[{match: '*.q_proj', dense: true}]",)
    run(model, plain, text, *sets)
    run(model, seen, text, *sets, "activations.bits=4")
    first, other = load_file(plain / "model.safetensors"), load_file(seen / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight_packed"
    assert not torch.equal(first[name], other[name])


def test_transforms_of_the_whole_model_build_on_each_other(tmp_path: Path, text: Path) -> None:
    model, teq = tiny_model("llama", tmp_path), "{name: teq, steps: 20, lr: 0.02, loss: kl}"
    result = run(model, tmp_path / "out", text, "method.name=rtn", f"transforms=[{teq}, {teq}]")
    first, second = (result.training[f"block 0 {name}"] for name in ("teq", "teq-2"))
    assert first["after"] < first["before"]
    assert second["before"] == pytest.approx(first["after"], rel=0.05)


def test_overrides_may_leave_a_reconstructed_block_to_others(tmp_path: Path, text: Path) -> None:
    model, sets = tiny_model("llama", tmp_path), ("method.name=lcq", "method.steps=4")
    result = run(model, tmp_path / "out", text, *sets, "overrides=[{match: '*.k_proj', method: {name: rtn}}]")
    assert {layer.method for layer in result.layers if layer.name.endswith("k_proj")} == {"rtn"}
    assert result.training["block 0 refine"]["steps"] == 4


def test_layers_that_no_transform_reaches_are_told(tmp_path: Path, text: Path) -> None:
    """GPT-2's MLP has an activation that no scale passes; its norms and attention are scaled."""
    model, out = tiny_model("gpt2", tmp_path), tmp_path / "out"
    result = run(model, out, text, "method.name=rtn", TEQ)
    assert result.to_json()["unscaled"] == ["mlp.c_proj"]
    assert json.loads((out / "qcli.manifest.json").read_text())["unscaled"] == ["mlp.c_proj"]
    assert run(model, tmp_path / "plain", text, "method.name=rtn").to_json()["unscaled"] == []


def test_method_teq_is_the_transform_and_then_rtn(tmp_path: Path, text: Path) -> None:
    model, short, long = tiny_model("llama", tmp_path), tmp_path / "short", tmp_path / "long"
    run(model, short, text, "method.name=teq", "method.steps=6", "method.lr=0.02")
    run(model, long, text, "method.name=rtn", TEQ)
    assert (short / "model.safetensors").read_bytes() == (long / "model.safetensors").read_bytes()


def test_transformed_dense_layers_and_norms_are_written(tmp_path: Path, text: Path) -> None:
    """What nobody quantizes is folded all the same."""
    model, plain, out = tiny_model("llama", tmp_path), tmp_path / "plain", tmp_path / "out"
    sets = ("method.name=rtn", "overrides=[{match: '*.k_proj', dense: true}]")
    run(model, plain, text, *sets)
    run(model, out, text, *sets, "transforms=[{name: teq, steps: 40, lr: 0.02}]")
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    norm, dense = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.k_proj.weight"
    alpha = before[norm] / after[norm]
    assert not torch.equal(alpha, torch.ones_like(alpha))
    torch.testing.assert_close(after[dense], before[dense] * alpha)
    assert loss(model, out, text) < loss(model, plain, text)


@pytest.mark.parametrize(
    "sets",
    [
        EVERYTHING,
        ("transforms=[{name: teq, steps: 6, lr: 0.02, loss: kl}]", "refine.scope=linear", "refine.steps=6"),
        ("method.name=lcq", "method.rank=2", "method.steps=6", TEQ, "low_rank.rank=2", "low_rank.bits=16"),
    ],
    ids=("block by block", "whole model", "codebooks"),
)
def test_interrupted_after_every_commit_gives_the_same_bytes(
    sets: tuple[str, ...], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path)
    run(model, tmp_path / "whole", text, *sets)
    stops = in_pieces(lambda: run(model, tmp_path / "pieces", text, *sets), tmp_path / "pieces", monkeypatch)
    assert stops >= 5  # tokens, transforms, two blocks, the rest
    whole, pieces = (tmp_path / name / "model.safetensors" for name in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()


@pytest.mark.parametrize(
    ("sets", "place"),
    [
        (("refine.steps=0",), "refine.steps"),
        (("refine.train=[]",), "refine"),
        (("refine.scope=model",), "refine.scope"),
        (("transforms=[tek]",), "did you mean 'teq'"),
        (("transforms=teq",), "must be a list"),
        (("transforms=[{name: teq, step: 3}]",), "did you mean 'steps'"),
        (("low_rank.rank=64",), "low_rank.rank 64 must be below 32"),
        (("activations.bits=2",), "activations.bits"),
        (("refine.steps=5", "calibration.held_out=12"), "none is left"),
        (
            ("method.name=rtn", "overrides=[{match: '*.k_proj', method: {name: teq}}]"),
            "transforms or reconstructs whole blocks",
        ),
        (("method.name=rtn", "overrides=[{match: '*.k_proj', method: {name: lcq}}]"), "reconstructs whole blocks"),
        (("method.name=lcq", "overrides=[{match: '*.k_proj', method: {steps: 0}}]"), "set its steps in the recipe"),
        (("transforms=[teq, {name: teq, loss: kl}]",), "name it before them"),
        (("method.name=lcq", "method.rank=8"), "rank 8 must be below"),
    ],
    ids=str,
)
def test_bad_options_are_told_before_any_work(sets: tuple[str, ...], place: str, tmp_path: Path, text: Path) -> None:
    with pytest.raises(UsageError, match=place.replace(".", r"\.")):
        run(tiny_model("llama", tmp_path), tmp_path / "out", text, *sets)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

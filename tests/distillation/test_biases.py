"""Biases of quantized layers are trained with their weights, and stored with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcli.algorithms.training.trainable_bias import TrainableBias
from qcli.distillation.distill import distill
from qcli.distillation.plan import plan_distillation
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.open import open_source
from qcli.recipe.load import load_recipe
from qcli.recipe.recipe import Recipe
from tests.algorithms.tensors import normal
from tests.quantizing import in_pieces, logits, run, streamed, weights, write_text
from tests.tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_bias_is_trained_as_it_will_be_stored(dtype: torch.dtype, scale: float) -> None:
    """Values are those that are stored; the gradient by a change is the unit times that by the value."""
    initial, pull = (scale * normal(12)).to(dtype), normal(12, seed=1)
    bias = TrainableBias(initial)
    assert torch.equal(bias.stored(), initial)
    with torch.no_grad():
        bias.changes.copy_(0.5 * normal(12, seed=2))
    value = bias.value(as_stored=False)
    assert torch.equal(value.detach(), bias.value(as_stored=True))
    assert torch.equal(value.detach(), bias.stored().float()) and bias.stored().dtype == dtype
    (value * pull).sum().backward()
    size = initial.float().abs()
    unit = size.maximum(0.1 * size.mean()) if scale else torch.full((12,), 0.1)
    assert bias.changes.grad is not None
    torch.testing.assert_close(bias.changes.grad, unit * pull)


def pair(tmp_path: Path, model_type: str, **flags: Any) -> tuple[Path, Path, Recipe]:
    """A student, whose biases are off by half, its teacher's folder, and the recipe to distill it."""
    teacher, student, text = tiny_model(model_type, tmp_path), tmp_path / "student", write_text(tmp_path)
    for name, tensor in (tensors := load_file(teacher / "model.safetensors")).items():
        if name.endswith(".bias") and tensor.ndim == 1:
            tensors[name] = tensor + 0.5 * normal(*tensor.shape)
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    run(teacher, student, text, **flags)
    fields = {
        "model": str(teacher),
        "calibration.data": str(text),
        "calibration.samples": 20,
        "calibration.seq_len": 32,
    }
    fields |= {"distill.steps": 12, "distill.judgements": 3, "distill.batch_tokens": 256, "distill.tables_lr": 0.02}
    return student, teacher, load_recipe(None, fields)


def biases(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(str(folder))
    return source.read(f"{name}.bias" for name in source.formats() if f"{name}.bias" in source.tensors())


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("opt", {"method__name": "onebit", "method__paper": True, "grouped": False}),
        ("gpt2", {"method__name": "rtn", "method__bits": 2}),
        ("qwen2", {"method__name": "dbllm"}),
    ],
)
def test_trained_biases_are_stored_and_computed_with(
    model_type: str, flags: dict[str, Any], scope: str, tmp_path: Path
) -> None:
    student, _, recipe = pair(tmp_path, model_type, **flags)
    recipe = load_recipe(None, recipe.to_dict() | {"distill.scope": scope})
    before, out = biases(student), tmp_path / "out"
    plan = plan_distillation(student, recipe)
    result = distill(student, recipe, out)
    assert before and result.outcome.best_step and result.outcome.after < result.outcome.before
    after = biases(out)
    assert after.keys() == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert sum(not torch.equal(after[name], before[name]) for name in before) >= len(before) // 2
    assert plan.trained >= sum(bias.numel() for bias in before.values())
    verify(out)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-3, atol=1e-3)
    if not flags.get("method__paper"):
        pack(out, tmp_path / "dense", format="dense", shard_size=10**9)
        packed = open_source(str(tmp_path / "dense"))
        assert all(torch.equal(packed.read([name])[name], bias) for name, bias in after.items())


@pytest.mark.slow
def test_an_interrupted_training_of_biases_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, _, recipe = pair(tmp_path, "gpt2", method__name="rtn", method__bits=2)
    distill(student, recipe, tmp_path / "whole")
    assert in_pieces(lambda: distill(student, recipe, tmp_path / "pieces"), tmp_path / "pieces", monkeypatch) > 1
    assert weights(tmp_path / "pieces") == weights(tmp_path / "whole")

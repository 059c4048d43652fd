"""LCQ on a layer's output error, and as a whole method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.lcq import LCQ
from qcli.core.formats.codebook import Codebook
from qcli.export.verify import verify
from qcli.quantization.plan import make_plan
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from tests.algorithms.methods.conftest import Case, output_loss
from tests.quantizing import logits, run, streamed, write_text
from tests.tiny import tiny_model

SHARED: dict[str, Any] = {"group_size": 32, "ridge": 0.1}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_step_helps(bits: int, case: Case) -> None:
    base = {**SHARED, "bits": bits}
    fitted = output_loss(LCQ(**base, refit_target=False, error_feedback=False, refit_tables=False), case)
    with_feedback = output_loss(LCQ(**base, refit_target=False, refit_tables=False), case)
    refitted = output_loss(LCQ(**base, refit_target=False), case)
    full = output_loss(LCQ(**base), case)
    assert full < refitted < with_feedback < fitted


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_beat_uniform_grids_at_equal_bits_per_weight(bits: int, case: Case) -> None:
    """Both store about one bit of tables per weight; the groups of codebooks are half as wide."""
    uniform = GPTQLike(**{**SHARED, "bits": bits}, zero_point="float")
    codebooks = LCQ(**{**SHARED, "group_size": 16, "bits": bits})
    shape = (1024, 960)
    assert codebooks.format.bits_per_weight(shape) <= uniform.format.bits_per_weight(shape) + 0.01
    assert output_loss(codebooks, case) < output_loss(uniform, case)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"rank": 2, "table_bits": 16},
        {"basis_rows": 20},
        {"group_size": -1},
        {"group_size": 40, "group_tail": "ragged"},
    ],
)
def test_feedback_and_refit_help_with_every_option(options: dict[str, Any], case: Case) -> None:
    base = {**SHARED, "bits": 2, **options}
    assert output_loss(LCQ(**base), case) < output_loss(LCQ(**base, error_feedback=False, refit_tables=False), case)


def test_each_layer_has_its_own_basis(case: Case) -> None:
    solutions = LCQ(**SHARED, bits=2, rank=2).quantize(case.group)
    bases = [solution.weight.tables["codebook_basis"] for solution in solutions.values()]
    assert all(basis.shape == (1, 2, 4) for basis in bases)
    assert not torch.equal(*bases)
    assert all(solution.target is not None for solution in solutions.values())


def test_a_hopeless_hessian_falls_back_to_rounding(case: Case) -> None:
    hopeless = torch.eye(96)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    solutions = LCQ(**SHARED, refit_target=False).quantize(LinearGroup(case.group.weights, hopeless))
    assert all("rounded to nearest" in solution.fallbacks[0] for solution in solutions.values())


def test_rank_must_be_below_the_number_of_entries() -> None:
    assert LCQ(bits=2, rank=3).rank == 3
    with pytest.raises(ValidationError, match=r"rank 4 must be below the 2\*\*bits = 4 entries"):
        LCQ(bits=2, rank=4)


def test_reconstruction_belongs_to_the_method() -> None:
    assert LCQ(steps=0).refine is None
    refine = LCQ(steps=7).refine
    assert refine is not None
    assert (refine.steps, refine.scope) == (7, "block")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "falcon"])
def test_checkpoints_load(model_type: str, tmp_path: Path) -> None:
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    flags: dict[str, Any] = {"method__name": "lcq", "method__bits": 2, "method__rank": 2, "method__steps": 3}
    result = run(model, out, write_text(tmp_path), **flags)
    assert verify(out).layers == len(result.layers)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    assert [name.split(" ", 2)[2] for name in result.training] == ["refine", "refine"]


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes_and_steps_help(tmp_path: Path) -> None:
    model, text, files = tiny_model("llama", tmp_path), write_text(tmp_path), []
    for name in ("once", "again"):
        flags: dict[str, Any] = {"method__bits": 2, "method__steps": 20, "calibration__samples": 24}
        flags |= {"method__error_feedback": False, "method__refit_target": False}  # leaves something to refine
        result = run(model, tmp_path / name, text, method__name="lcq", **flags)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
        before, after = (sum(outcome[key] for outcome in result.training.values()) for key in ("before", "after"))
        assert after < 0.95 * before
    assert files[0] == files[1]


@pytest.mark.slow
def test_sizes_are_planned_to_the_byte(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"model": str(tiny_model("llama", tmp_path)), "method.name": "lcq"}
    flags |= {"method.group_size": 32, "method.basis_rows": 24, "method.steps": 0}
    flags |= {"calibration.data": str(write_text(tmp_path)), "calibration.samples": 6, "calibration.seq_len": 32}
    recipe = load_recipe(None, flags)
    result = quantize(recipe, tmp_path / "out")
    assert make_plan(recipe).bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    format = Codebook(bits=4, group_size=32, rank=1, table_bits=8, basis_rows=24)
    assert all(layer.spec == format.spec() for layer in result.layers)

"""DB-LLM on a layer's output error, and as a whole method."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from qcli.algorithms.methods.dbllm import DBLLM
from qcli.algorithms.methods.rtn import RTN
from qcli.cli.quantize import show_result
from qcli.cli.ui.tables import Tables, console
from qcli.distillation.distill import distill
from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.recipe.load import load_recipe
from tests.algorithms.methods.conftest import Case, output_loss
from tests.quantizing import logits, run, streamed, write_text
from tests.tiny import tiny_model

ROUNDED: dict[str, Any] = {  # to the paper's split
    "method__start": "published",
    "method__refit_target": False,
    "method__error_feedback": False,
    "method__refit_tables": False,
}


@pytest.mark.parametrize("levels", ["fdb", "symmetric"])
def test_every_step_helps(levels: Literal["fdb", "symmetric"], case: Case) -> None:
    base: dict[str, Any] = {"levels": levels, "group_size": 32}
    fitted = output_loss(DBLLM(**base, refit_target=False, error_feedback=False, refit_tables=False), case)
    with_feedback = output_loss(DBLLM(**base, refit_target=False, refit_tables=False), case)
    refitted = output_loss(DBLLM(**base, refit_target=False), case)
    full = output_loss(DBLLM(**base, ridge=0.1), case)
    assert full < refitted < with_feedback < fitted < output_loss(RTN(bits=2, group_size=32), case)


def test_the_published_start_alone_is_the_papers_split(case: Case) -> None:
    """Rounded to the levels -s, 0, s, 2s, whatever the inputs; the default gains error for additions."""
    rest: dict[str, Any] = {"refit_target": False, "error_feedback": False, "refit_tables": False}
    published = DBLLM(start="published", group_size=32, **rest)
    for name, solution in published.quantize(case.group).items():
        groups = case.group.weights[name].view(len(case.group.weights[name]), 3, 32)
        s = groups.abs().amax(-1, keepdim=True)[..., None] / 2
        levels = s * torch.tensor([-1.0, 0.0, 1.0, 2.0])
        error = (groups[..., None] - levels).abs().amin(-1).square().sum()
        actual = (solution.weight.dense() - case.group.weights[name]).square().sum()
        torch.testing.assert_close(actual, error, rtol=1e-3, atol=0)
    full = DBLLM(start="published", group_size=32)
    assert output_loss(DBLLM(group_size=32), case) < output_loss(full, case) < output_loss(published, case)


def test_no_published_split_of_signs() -> None:
    with pytest.raises(ValidationError, match="set levels to fdb, or start to searched"):
        DBLLM.model_validate({"start": "published", "levels": "symmetric"})


def test_bits_are_fixed() -> None:
    with pytest.raises(ValidationError, match="bits"):
        DBLLM.model_validate({"bits": 3})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_checkpoints_load_and_refinement_helps(model_type: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"refine__steps": 40, "calibration__samples": 24}
    flags |= {"method__error_feedback": False, "method__refit_target": False}  # leaves something to refine
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    result = run(model, out, write_text(tmp_path), method__name="dbllm", **flags)
    assert verify(out).layers == len(result.layers)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    before, after = (sum(outcome[key] for outcome in result.training.values()) for key in ("before", "after"))
    assert after < 0.98 * before


@pytest.mark.slow
def test_additions_of_the_stored_planes_are_reported(tmp_path: Path) -> None:
    """By layer, and over all weights: in JSON, tables and card; after training those of the trained planes; nowhere
    where the layout has no planes."""
    text, model, out = write_text(tmp_path), tiny_model("llama", tmp_path), tmp_path / "out"
    result = run(model, out, text, method__name="dbllm", **ROUNDED)
    summary = stored_planes(out)
    assert result.to_json()["facts"] == pytest.approx(summary)
    shown = io.StringIO()
    show_result(Tables(console(shown)), result.to_json())
    assert f"additions per weight  {summary['additions_per_weight']:.3g}; zeros are" in shown.getvalue()

    flags = {"model": str(model), "calibration.data": str(text), "calibration.samples": 20, "calibration.seq_len": 32}
    flags |= {"distill.steps": 12, "distill.judgements": 2, "distill.batch_tokens": 256, "distill.tables_lr": 0.02}
    flags |= {"distill.train": ["tables", "weights"], "distill.weights_lr": 0.06}
    trained = distill(out, load_recipe(None, flags), tmp_path / "distilled")
    assert trained.outcome.best_step
    assert stored_planes(tmp_path / "distilled") != summary

    pack(out, tmp_path / "native", format="qcli", shard_size=10**9)
    assert stored_planes(tmp_path / "native") == summary
    pack(out, tmp_path / "dense", format="dense", shard_size=10**9)
    assert inspect(tmp_path / "dense").facts == {}
    assert "additions" not in (tmp_path / "dense" / "README.md").read_text()


def stored_planes(folder: Path) -> dict[str, float]:
    """The mean facts of a folder as counted from its codes; asserts that `inspect` and card say so."""
    inspection, source = inspect(folder), open_source(str(folder))
    rows = {row["name"]: row for row in inspection.layers}
    assert isinstance(source, NativeSource)
    ones, n_weights = [0, 0], 0
    for name, row in rows.items():
        codes = source.read_quantized(name).codes
        own = [int((codes >> plane & 1).sum()) for plane in (0, 1)]
        shares = [count / codes.numel() for count in own]
        assert (row["zeros_plane1"], row["zeros_plane2"]) == pytest.approx((1 - shares[0], 1 - shares[1]))
        assert row["additions_per_weight"] == pytest.approx(sum(shares))
        assert 0.5 < row["zeros_plane1"] < 0.9
        ones, n_weights = [before + count for before, count in zip(ones, own, strict=True)], n_weights + codes.numel()
    first, second = (count / n_weights for count in ones)
    expected = {"zeros_plane1": 1 - first, "zeros_plane2": 1 - second, "additions_per_weight": first + second}
    assert inspection.facts == pytest.approx(expected)
    assert f"| additions per weight | {first + second:.3g}; zeros are" in (folder / "README.md").read_text()
    return inspection.facts

"""DB-LLM on a layer's output error, and as a whole method."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from qcli.algorithms.methods.dbllm import DBLLM
from qcli.algorithms.methods.rtn import RTN
from qcli.export.inspect import inspect
from qcli.export.verify import verify
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from tests.algorithms.methods.conftest import Case, output_loss
from tests.quantizing import logits, run, streamed, write_text
from tests.tiny import tiny_model


@pytest.mark.parametrize("levels", ["fdb", "symmetric"])
def test_every_step_helps(levels: Literal["fdb", "symmetric"], case: Case) -> None:
    base: dict[str, Any] = {"levels": levels, "group_size": 32}
    fitted = output_loss(DBLLM(**base, refit_target=False, error_feedback=False, refit_tables=False), case)
    with_feedback = output_loss(DBLLM(**base, refit_target=False, refit_tables=False), case)
    refitted = output_loss(DBLLM(**base, refit_target=False), case)
    full = output_loss(DBLLM(**base, ridge=0.1), case)
    assert full < refitted < with_feedback < fitted < output_loss(RTN(bits=2, group_size=32), case)


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
def test_inspect_reports_the_sparsity_of_the_stored_planes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny_model("llama", tmp_path), out, write_text(tmp_path), method__name="dbllm", refine__steps=4)
    rows = {row["name"]: row for row in inspect(out).layers}
    source = open_source(str(out))
    assert isinstance(source, NativeSource)
    for name, row in rows.items():
        codes = source.read_quantized(name).codes
        ones = [float((codes >> plane & 1).float().mean()) for plane in (0, 1)]
        assert (row["zeros_plane1"], row["zeros_plane2"]) == pytest.approx((1 - ones[0], 1 - ones[1]))
        assert row["additions_per_weight"] == pytest.approx(sum(ones))
        assert 0.5 < row["zeros_plane1"] < 0.9

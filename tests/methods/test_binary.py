"""OneBit and DB-LLM on a layer's own objective, and as whole methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from qcli.inspection import inspect
from qcli.methods.dbllm import DBLLM
from qcli.methods.onebit import OneBit
from qcli.methods.rtn import RTN
from qcli.models.native import NativeSource
from qcli.models.source import open_source
from qcli.verify import verify
from tests.methods.conftest import Case, loss
from tests.quantizing import logits, run, streamed, write_text
from tests.tiny import tiny_model


def test_every_step_of_onebit_helps(case: Case) -> None:
    decomposed = loss(OneBit(refit_target=False, error_feedback=False, refit_scales=False), case)
    fed = loss(OneBit(refit_target=False, refit_scales=False), case)
    solved = loss(OneBit(refit_target=False), case)
    aimed = loss(OneBit(ridge=0.1), case)
    assert aimed < solved < fed < decomposed


@pytest.mark.parametrize("levels", ["fdb", "symmetric"])
def test_every_step_of_dbllm_helps(levels: Literal["fdb", "symmetric"], case: Case) -> None:
    base: dict[str, Any] = {"levels": levels, "group_size": 32}
    split = loss(DBLLM(**base, refit_target=False, error_feedback=False, refit_tables=False), case)
    fed = loss(DBLLM(**base, refit_target=False, refit_tables=False), case)
    solved = loss(DBLLM(**base, refit_target=False), case)
    aimed = loss(DBLLM(**base, ridge=0.1), case)
    assert aimed < solved < fed < split < loss(RTN(bits=2, group_size=32), case)


def test_widths_are_fixed() -> None:
    with pytest.raises(ValidationError, match="bits"):
        OneBit.model_validate({"bits": 2})
    with pytest.raises(ValidationError, match="bits"):
        DBLLM.model_validate({"bits": 3})


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["onebit", "dbllm"])
def test_packed_is_streamed_and_refinement_helps(method: str, model_type: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"method__name": method} | ({} if method == "onebit" else {"method__group_size": 32})
    flags |= {"refine__steps": 40, "calibration__samples": 24}
    flags |= {"method__error_feedback": False, "method__refit_target": False}  # leaves something to refine
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    result = run(model, out, write_text(tmp_path), grouped=False, **flags)
    assert verify(out).layers == len(result.layers)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    before, after = (sum(outcome[key] for outcome in result.training.values()) for key in ("before", "after"))
    assert after < 0.98 * before


def test_planes_are_told_as_they_are_stored(tmp_path: Path) -> None:
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

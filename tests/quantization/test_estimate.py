"""How long a quantization would take: counted, at measured speeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcli.quantization import estimate
from qcli.quantization.estimate import estimated_seconds
from qcli.quantization.plan import Plan, make_plan
from qcli.recipe.load import load_recipe
from tests.quantizing import write_text
from tests.tiny import tiny_model


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    text = write_text(tmp_path)

    def planned(layers: int = 2, **fields: Any) -> Plan:
        model = tiny_model("llama", tmp_path, num_hidden_layers=layers)
        given = {"model": str(model), "calibration.data": str(text), "calibration.samples": 64}
        return make_plan(load_recipe(None, given | {name.replace("__", "."): value for name, value in fields.items()}))

    return planned


@pytest.mark.parametrize(
    "fields",
    [
        {"method__name": "gptq-like", "method__bits": 3},
        {"method__name": "lcq", "refine": None},
        {"method__name": "onebit"},
        {"method__name": "dbllm"},
        {"method__name": "teq"},
        {"method__name": "rtn", "refine__steps": 3, "method__group_size": 32},
        {"method__name": "gptq-like", "low_rank__rank": 2},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_every_kind_of_calibrated_method_is_probed(plan: Callable[..., Plan], fields: dict[str, Any]) -> None:
    seconds = estimated_seconds(plan(**fields))
    assert seconds is not None and 0 < seconds < 3600


def test_nothing_is_told_that_a_probe_does_not_know(plan: Callable[..., Plan]) -> None:
    assert estimated_seconds(plan(method__name="rtn")) is None
    assert estimated_seconds(plan(method__bits="auto", method__target_bpw=3.8)) is None


def test_time_grows_with_the_work(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine where every measurement takes as long."""
    monkeypatch.setattr(estimate._Probe, "_seconds", lambda self, work, repeated=False: 1e-3)

    def seconds(**fields: Any) -> float:
        found = estimated_seconds(plan(**fields))
        assert found is not None
        return found - estimate._START

    base = seconds()
    assert seconds(layers=4) == pytest.approx(2 * base)
    assert seconds(calibration__samples=640) > 2 * base
    trained = seconds(refine__steps=100)
    assert seconds(refine__steps=200) - trained == pytest.approx(trained - seconds(refine__steps=1), rel=0.02)

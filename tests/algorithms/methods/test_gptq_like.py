"""gptq-like on a layer's output error: every step and option helps, and what fails is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method
from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.lcq import LCQ
from qcli.algorithms.methods.rtn import RTN
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UsageError
from tests.algorithms.methods.conftest import Case, output_loss

PLAIN: dict[str, Any] = {
    "refit_target": False,
    "refit_tables": False,
    "grid": "minmax",
    "column_order": "none",
}


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("options", [{"symmetric": True}, {}, {"zero_point": "float"}])
def test_every_step_helps(bits: int, options: dict[str, Any], case: Case) -> None:
    base: dict[str, Any] = {"bits": bits, "group_size": 32, **options}
    rtn = output_loss(RTN(**base), case)
    plain = output_loss(GPTQLike(**base, **PLAIN), case)
    searched = output_loss(GPTQLike(**base, **(PLAIN | {"grid": "search", "column_order": "static"})), case)
    full = output_loss(GPTQLike(**base, ridge=0.1), case)
    assert full < searched < plain < rtn


@pytest.mark.parametrize(
    "options",
    [
        {"column_order": "group-aware"},
        {"column_order": "none"},
        {"refit_target": False, "gptaq_alpha": 0.25},
        {"group_size": 40, "group_tail": "ragged"},
        {"group_size": -1},
        {"group_size": 40, "group_tail": "ragged", "column_order": "group-aware"},
    ],
)
def test_every_option_beats_rtn(options: dict[str, Any], case: Case) -> None:
    base = {"bits": 3, "group_size": 32} | options
    groups = {key: base[key] for key in ("bits", "group_size", "group_tail") if key in base}
    assert output_loss(GPTQLike(**base), case) < output_loss(RTN(**groups), case)


def test_stacking_layers_changes_nothing(case: Case) -> None:
    group, method = case.group, GPTQLike(bits=3, group_size=32)
    together = method.quantize(group)
    for name, weight in group.weights.items():
        alone = method.quantize(LinearGroup({name: weight}, group.hessian, group.cross))[name]
        agreement = (alone.weight.codes == together[name].weight.codes).float().mean()
        assert float(agreement) > 0.999


def test_a_hopeless_hessian_falls_back_to_rounding(case: Case) -> None:
    hopeless = torch.eye(96)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    method = GPTQLike(bits=4, group_size=32, refit_target=False)
    solutions = method.quantize(LinearGroup(case.group.weights, hopeless))
    expected = ["Hessian not positive definite at any damping: rounded to nearest"]
    assert [solution.fallbacks for solution in solutions.values()] == [expected, expected]


@pytest.mark.parametrize("method", [GPTQLike(bits=3, group_size=48), LCQ(bits=3, group_size=48)], ids=lambda m: m.name)
def test_dead_inputs_take_nothing_from_live_ones(method: Method) -> None:
    """With dead inputs between them and live ones small, codes are as good as without the dead inputs."""
    generator = torch.Generator().manual_seed(1)
    inputs = 0.01 * torch.randn(400, 64, generator=generator)
    weight = torch.randn(32, 96, generator=generator)
    live = torch.randperm(96, generator=generator)[:64].sort().values
    live_hessian, hessian = inputs.T @ inputs / 400, torch.zeros(96, 96)
    hessian[live[:, None], live] = live_hessian

    def error(columns: torch.Tensor, hessian: torch.Tensor) -> float:
        group = LinearGroup({"w": weight[:, columns]}, hessian, hessian, torch.zeros(32, len(columns)))
        difference = method.quantize(group)["w"].weight.dense() - weight[:, columns]
        return float((difference @ hessian * difference).sum())

    without = [error(live[half], live_hessian[half][:, half]) for half in (slice(0, 32), slice(32, 64))]
    assert error(torch.arange(96), hessian) < 1.1 * sum(without)


def test_each_layer_reports_only_its_own_rows(case: Case) -> None:
    """A row of zeros has no scale to solve for."""
    weights = {name: weight.clone() for name, weight in case.group.weights.items()}
    weights["a"][:3] = 0
    method = GPTQLike(bits=3, group_size=32, refit_target=False)
    solutions = method.quantize(LinearGroup(weights, case.group.hessian))
    assert solutions["a"].fallbacks == ["scale refit unusable in 3 of 64 rows: kept the searched scales"]
    assert solutions["b"].fallbacks == []
    assert not solutions["a"].weight.dense()[:3].any()


def test_residual_goes_with_the_target_refit() -> None:
    assert GPTQLike().corrects_residual
    assert not GPTQLike(refit_target=False).corrects_residual
    assert not GPTQLike(residual=False).corrects_residual
    with pytest.raises(ValidationError, match="residual is a part of refit_target"):
        GPTQLike(refit_target=False, residual=True)


def test_gptaq_replaces_the_target_refit() -> None:
    with pytest.raises(ValidationError, match="gptaq_alpha replaces refit_target"):
        GPTQLike(gptaq_alpha=0.25)


def test_recipe_without_target_refit_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"model": "m"}, ["method.refit_target=false"])
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert "residual: auto" in recipe.to_yaml()
    assert load_recipe(file, {}) == recipe
    with pytest.raises(UsageError, match=r"method: residual is a part of refit_target"):
        load_recipe(file, {}, ["method.residual=true"])


def test_needs_follow_the_options() -> None:
    assert GPTQLike().needs == {"hessian", "output_gap"}
    assert GPTQLike(residual=False).needs == {"hessian", "cross"}
    assert GPTQLike(refit_target=False).needs == {"hessian"}
    assert GPTQLike(refit_target=False, gptaq_alpha=0.25).needs == {"hessian", "cross"}

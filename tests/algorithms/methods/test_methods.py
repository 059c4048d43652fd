"""Every method on a layer's own objective: the output error on the inputs the layer will get."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

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
from tests.algorithms.methods.conftest import Case, loss

PLAIN: dict[str, Any] = {
    "refit_target": False,
    "refit_tables": False,
    "grid": "minmax",
    "column_order": "none",
}


OPTIONS = [{"symmetric": True}, {}, {"zero_point": "float"}]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_step_of_gptq_like_helps(bits: int, options: dict[str, Any], case: Case) -> None:
    base: dict[str, Any] = {"bits": bits, "group_size": 32, **options}
    rtn = loss(RTN(**base), case)
    plain = loss(GPTQLike(**base, **PLAIN), case)
    ordered = loss(GPTQLike(**base, **(PLAIN | {"grid": "search", "column_order": "static"})), case)
    full = loss(GPTQLike(**base, ridge=0.1), case)
    assert plain < rtn
    assert ordered < plain
    assert full < ordered


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
def test_options_beat_rtn(options: dict[str, Any], case: Case) -> None:
    shared = {"bits": 3, "group_size": 32} | {
        key: options[key] for key in ("group_size", "group_tail") if key in options
    }
    assert loss(GPTQLike(**({"bits": 3, "group_size": 32} | options)), case) < loss(RTN(**shared), case)


@pytest.mark.parametrize("grid", ["search", "hessian"])
def test_searched_rtn_beats_minmax_on_what_it_minimises(grid: Literal["search", "hessian"], case: Case) -> None:
    group = case[0]
    assert group.hessian is not None
    importance = group.hessian.diagonal() if grid == "hessian" else torch.ones(96)
    power = 2.0 if grid == "hessian" else 2.4

    def weight_error(method: RTN) -> float:
        solutions = method.quantize(group)
        return sum(
            float(((solutions[name].weight.dense() - weight).abs().pow(power) * importance).sum())
            for name, weight in group.weights.items()
        )

    assert weight_error(RTN(bits=2, group_size=32, grid=grid)) < weight_error(RTN(bits=2, group_size=32))


def test_stacking_layers_changes_nothing(case: Case) -> None:
    group, method = case[0], GPTQLike(bits=3, group_size=32)
    together = method.quantize(group)
    for name, weight in group.weights.items():
        alone = method.quantize(LinearGroup({name: weight}, group.hessian, group.cross))[name]
        same = (alone.weight.codes == together[name].weight.codes).float().mean()
        assert float(same) > 0.999


def test_a_hopeless_hessian_is_reported(case: Case) -> None:
    hopeless = torch.eye(96)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    weights = case[0].weights
    solutions = GPTQLike(bits=4, group_size=32, refit_target=False).quantize(LinearGroup(weights, hopeless))
    assert all("rounded to nearest" in solution.fallbacks[0] for solution in solutions.values())


@pytest.mark.parametrize("method", [GPTQLike(bits=3, group_size=48), LCQ(bits=3, group_size=48)], ids=lambda m: m.name)
def test_dead_inputs_take_nothing_from_live_ones(method: Method) -> None:
    """However many inputs are always 0 and however small the others are: codes are as good as without the dead ones."""
    generator = torch.Generator().manual_seed(1)
    inputs = 0.01 * torch.randn(400, 64, generator=generator)
    weight = torch.randn(32, 96, generator=generator)
    live = torch.randperm(96, generator=generator)[:64].sort().values
    moment, whole = inputs.T @ inputs / 400, torch.zeros(96, 96)
    whole[live[:, None], live] = moment

    def error(columns: torch.Tensor, hessian: torch.Tensor) -> float:
        group = LinearGroup({"w": weight[:, columns]}, hessian, hessian, torch.zeros(32, len(columns)))
        dense = method.quantize(group)["w"].weight.dense()
        difference = dense - weight[:, columns]
        return float((difference @ hessian * difference).sum())

    without = [error(live[half], moment[half][:, half]) for half in (slice(0, 32), slice(32, 64))]
    assert error(torch.arange(96), whole) < 1.1 * sum(without)


def test_each_layer_reports_only_its_own_rows(case: Case) -> None:
    """A row of zeros has no scale to solve for."""
    weights = {name: weight.clone() for name, weight in case[0].weights.items()}
    weights["a"][:3] = 0
    solutions = GPTQLike(bits=3, group_size=32, refit_target=False).quantize(LinearGroup(weights, case[0].hessian))
    assert solutions["a"].fallbacks == ["scale refit unusable in 3 of 64 rows: kept the searched scales"]
    assert solutions["b"].fallbacks == []
    assert not solutions["a"].weight.dense()[:3].any()


def test_residual_goes_with_the_target_refit() -> None:
    assert GPTQLike().repairs_residual
    assert not GPTQLike(refit_target=False).repairs_residual
    assert not GPTQLike(residual=False).repairs_residual
    with pytest.raises(ValidationError, match="residual is a part of refit_target"):
        GPTQLike(refit_target=False, residual=True)


def test_switching_the_target_refit_off_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"model": "m"}, ["method.refit_target=false"])
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert "residual: auto" in recipe.to_yaml()
    assert load_recipe(file, {}) == recipe
    with pytest.raises(UsageError, match=r"method: residual is a part of refit_target"):
        load_recipe(file, {}, ["method.residual=true"])


def test_needs_follow_the_options() -> None:
    assert GPTQLike().needs == {"hessian", "cross", "residual_cross"}
    assert GPTQLike(residual=False).needs == {"hessian", "cross"}
    assert GPTQLike(refit_target=False).needs == {"hessian"}
    assert RTN().needs == frozenset()
    assert RTN(grid="hessian").needs == {"hessian"}


@pytest.mark.parametrize(("group_size", "fits"), [(32, True), (-1, True), (40, False), (0, False)])
def test_groups_that_do_not_divide_are_a_misfit(group_size: int, fits: bool) -> None:
    assert (RTN(group_size=group_size).misfit((8, 96)) is None) is fits
    assert RTN(group_size=40, group_tail="ragged").misfit((8, 96)) is None

"""Round to nearest: searched grids, its needs, and the shapes it takes."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from qcli.algorithms.methods.rtn import RTN
from tests.algorithms.methods.conftest import Case


@pytest.mark.parametrize("grid", ["search", "hessian"])
def test_searched_grids_beat_minmax_on_their_objective(grid: Literal["search", "hessian"], case: Case) -> None:
    group = case.group
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


def test_needs_follow_the_grid() -> None:
    assert RTN().needs == RTN(grid="search").needs == frozenset()
    assert RTN(grid="hessian").needs == {"hessian"}


@pytest.mark.parametrize(("group_size", "fits"), [(32, True), (-1, True), (40, False), (0, False)])
def test_groups_must_divide_rows_unless_ragged(group_size: int, fits: bool) -> None:
    assert (RTN(group_size=group_size).unsupported_reason((8, 96)) is None) is fits
    assert RTN(group_size=40, group_tail="ragged").unsupported_reason((8, 96)) is None

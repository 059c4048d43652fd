"""The exact solver against brute force."""

from __future__ import annotations

import random
from itertools import product
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcli.algorithms.solvers.knapsack import minimize_loss

OPTION = st.tuples(st.one_of(st.just(inf), st.integers(0, 20).map(lambda n: n / 8)), st.integers(0, 9))


@given(st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(0, 40))
def test_no_combination_within_the_budget_is_better(items: list[list[tuple[float, int]]], budget: int) -> None:
    losses = [[loss for loss, _ in item] for item in items]
    costs = [[cost for _, cost in item] for item in items]
    reachable = [
        sum(loss for loss, _ in combination)
        for combination in product(*items)
        if sum(cost for _, cost in combination) <= budget and all(loss < inf for loss, _ in combination)
    ]
    if not reachable:
        with pytest.raises(ValueError, match="more than the budget"):
            minimize_loss(losses, costs, budget)
        return
    chosen = minimize_loss(losses, costs, budget)
    assert sum(item[option][1] for item, option in zip(items, chosen, strict=True)) <= budget
    assert sum(item[option][0] for item, option in zip(items, chosen, strict=True)) == pytest.approx(min(reachable))


def test_large_models_are_fast() -> None:
    """900 layers of few sizes, the losses of which fall fourfold with each bit."""
    draw = random.Random(0)
    losses, costs = [], []
    for _ in range(900):
        size, loss = draw.choice((110592, 331776, 884736)), 10 ** draw.uniform(-4, -1)
        losses.append([loss * 4**-n * draw.uniform(0.8, 1.2) for n in range(4)])
        costs.append([size * (2 + n) + size // 64 * (18 + n) for n in range(4)])
    budget = round(sum(cost[1] for cost in costs) * 1.01)
    chosen = minimize_loss(losses, costs, budget)
    assert sum(cost[option] for cost, option in zip(costs, chosen, strict=True)) <= budget
    assert set(chosen) == {0, 1, 2, 3}

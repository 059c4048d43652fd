"""The multiple-choice knapsack, solved exactly: one option per item, the least total loss within a budget.

Dynamic programming over the items. A Lagrange multiplier gives a lower bound on the loss of every completion of a
state; states whose bound is above a known solution, and states dominated in both cost and loss, are pruned. With many
items the gap between the bounds is about one item's loss, so few states survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

_BISECTIONS = 100  # of the multiplier


class _Option(NamedTuple):
    loss: float
    cost: int
    number: int


_Item = list[_Option]


class _State(NamedTuple):
    """Options chosen for the first items: their sums, the last one's number, and the state before it."""

    cost: int
    loss: float
    option: int = 0
    previous: _State | None = None


def minimize_loss(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Choose one option per item with the least sum of losses such that the sum of costs is at most `budget`.

    Among equal solutions the choice is deterministic.

    Args:
        losses: by item and option; infinite: not to be chosen.
        costs: by item and option.
        budget: in the unit of the costs.

    Returns:
        The number of each item's option.

    Raises:
        ValueError: the cheapest options together exceed the budget.
    """
    items = [
        [_Option(loss, cost, number) for number, (loss, cost) in enumerate(zip(*both, strict=True)) if loss < inf]
        for both in zip(losses, costs, strict=True)
    ]
    if any(not item for item in items) or sum(min(option.cost for option in item) for item in items) > budget:
        raise ValueError("the cheapest options cost more than the budget")
    price = _multiplier(items, budget)
    upper_bound = _greedy_loss(items, price, budget)
    slack = 1e-9 * (1 + abs(upper_bound))
    rest = [0.0]  # least priced loss of the remaining items, by the number of items done
    for item in reversed(items):
        rest.append(rest[-1] + min(option.loss + price * option.cost for option in item))
    rest.reverse()

    states = [_State(0, 0.0)]
    for number, item in enumerate(items, start=1):
        extended = [
            _State(state.cost + option.cost, state.loss + option.loss, option.number, state)
            for state in states
            for option in item
            if state.loss + option.loss + price * (state.cost + option.cost) + rest[number] - price * budget
            <= upper_bound + slack
        ]
        extended.sort(key=lambda state: (state.cost, state.loss))
        states, least = [], inf
        for state in extended:
            if state.cost <= budget and state.loss < least:
                states.append(state)
                least = state.loss
    options, last = [], states[-1]
    while last.previous is not None:
        options.append(last.option)
        last = last.previous
    return options[::-1]


def _multiplier(items: Sequence[_Item], budget: int) -> float:
    """The least price, in loss per unit of cost, at which the options with the least priced loss fit the budget."""
    low, high = 0.0, 1.0
    while sum(option.cost for option in _relaxed(items, high)) > budget:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = sum(option.cost for option in _relaxed(items, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return high


def _relaxed(items: Sequence[_Item], price: float) -> list[_Option]:
    """The option of each item with the least loss plus priced cost, the cheaper of equal ones."""
    return [min(item, key=lambda option: (option.loss + price * option.cost, option.cost)) for item in items]


def _greedy_loss(items: Sequence[_Item], price: float, budget: int) -> float:
    """The loss of a good solution: the options of `_relaxed`, improved one by one while the budget lasts."""
    best = _relaxed(items, price)
    loss, cost = sum(option.loss for option in best), sum(option.cost for option in best)
    while True:
        better = [
            (option.loss - best[number].loss, number, option)
            for number, item in enumerate(items)
            for option in item
            if option.loss < best[number].loss and cost + option.cost - best[number].cost <= budget
        ]
        if not better:
            return loss
        gain, number, option = min(better)
        loss, cost, best[number] = loss + gain, cost + option.cost - best[number].cost, option

"""One option for each item, the least loss within a budget: the multiple-choice knapsack, solved exactly.

States are built item by item. A Lagrange multiplier bounds what any completion of a state can reach; states that
cannot beat a solution already known, or that another beats in both cost and loss, are dropped. With many items the
gap between the two bounds is as small as one item's, so few states survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

_HALVINGS = 100  # of the multiplier's interval


def cheapest_loss(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The option of each item whose losses sum to the least while their costs stay within `budget`.

    Of solutions alike, one is taken always the same way.

    Args:
        losses: by item and option; infinite: not to be taken.
        costs: likewise.

    Raises:
        ValueError: the cheapest options cost more than the budget.
    """
    items = [
        [(loss, cost, option) for option, (loss, cost) in enumerate(zip(*both, strict=True)) if loss < inf]
        for both in zip(losses, costs, strict=True)
    ]
    if any(not item for item in items) or sum(min(cost for _, cost, _ in item) for item in items) > budget:
        raise ValueError("the cheapest options cost more than the budget")
    price = _price(items, budget)
    known = _within(items, price, budget)
    slack = 1e-9 * (1 + abs(known))
    rest = [0.0]  # least priced loss of the items to come
    for item in reversed(items):
        rest.append(rest[-1] + min(loss + price * cost for loss, cost, _ in item))
    rest.reverse()

    states: list[tuple[int, float, tuple[object, ...]]] = [(0, 0.0, ())]  # cost, loss, options so far as nested pairs
    for number, item in enumerate(items, start=1):
        grown = [
            (cost + more, loss + added, (chosen, option))
            for cost, loss, chosen in states
            for added, more, option in item
            if loss + added + price * (cost + more) + rest[number] - price * budget <= known + slack
        ]
        grown.sort(key=lambda state: state[:2])
        states, least = [], inf
        for state in grown:
            if state[0] <= budget and state[1] < least:
                states.append(state)
                least = state[1]
    chosen = states[-1][2]
    options: list[int] = []
    while chosen:
        chosen, option = chosen  # type: ignore[assignment]
        options.append(option)  # type: ignore[arg-type]
    return options[::-1]


_Item = list[tuple[float, int, int]]


def _price(items: Sequence[_Item], budget: int) -> float:
    """The least multiplier, loss per cost, at which the best priced options keep within the budget."""
    low, high = 0.0, 1.0
    while _taken(items, high)[1] > budget:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _taken(items, middle)[1] <= budget else (middle, high)
    return high


def _taken(items: Sequence[_Item], price: float) -> tuple[float, int]:
    """Loss and cost of the best priced options, the cheaper one of two alike."""
    best = [min(item, key=lambda option: (option[0] + price * option[1], option[1])) for item in items]
    return sum(loss for loss, _, _ in best), sum(cost for _, cost, _ in best)


def _within(items: Sequence[_Item], price: float, budget: int) -> float:
    """The loss of a good solution: the best priced options, and what else the budget leaves room for."""
    best = [min(item, key=lambda option: (option[0] + price * option[1], option[1])) for item in items]
    loss, cost = sum(option[0] for option in best), sum(option[1] for option in best)
    while True:
        better = [
            (option[0] - best[number][0], number, option)
            for number, item in enumerate(items)
            for option in item
            if option[0] < best[number][0] and cost + option[1] - best[number][1] <= budget
        ]
        if not better:
            return loss
        gain, number, option = min(better)
        loss, cost, best[number] = loss + gain, cost + option[1] - best[number][1], option

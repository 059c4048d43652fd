"""One group of linears: the recipe's method, and the low-rank compensation that follows it."""

from __future__ import annotations

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.recipe.recipe import Recipe


def solve(recipe: Recipe, method: Method, group: LinearGroup) -> dict[str, Solution]:
    """Codes and tables for each of `group.weights`, low-rank factors included where the recipe has them."""
    solutions = method.quantize(group)
    return solutions if recipe.low_rank is None else recipe.low_rank.compensate(method, group, solutions)

"""One group of linears: its method, low-rank compensation after it, and the scaling of rows around both."""

from __future__ import annotations

from dataclasses import replace

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.low_rank import LowRankCompensation
from qcli.algorithms.method import Method, Solution
from qcli.core.formats.row_scaled import RowScaled
from qcli.core.weight import Format


def stored_format(method: Method, low_rank: LowRankCompensation | None) -> Format:
    """The format of the layers that `solve` quantizes."""
    format = method.format if low_rank is None else low_rank.format(method.format)
    return RowScaled.around(format) if method.scales_rows else format


def solve(method: Method, low_rank: LowRankCompensation | None, group: LinearGroup) -> dict[str, Solution]:
    """Codes and tables for each of `group.weights`, with low-rank factors if `low_rank` is given.

    Where the method scales rows, it and the factors are fitted to rows whose largest weights are between 0.5 and 1.
    """
    if not method.scales_rows:
        solutions = method.quantize(group)
        return solutions if low_rank is None else low_rank.compensate(method, group, solutions)
    format, shifted = stored_format(method, low_rank), RowScaled.shifted
    assert isinstance(format, RowScaled)
    exponents = {name: format.exponents(weight) for name, weight in group.weights.items()}
    scaled = replace(group, weights={name: shifted(weight, -exponents[name]) for name, weight in group.weights.items()})
    if group.output_gap is not None:  # its rows are those of the group's only layer
        (exponent,) = exponents.values()
        scaled.output_gap = shifted(group.output_gap, -exponent)
    solutions = method.quantize(scaled)
    if low_rank is not None:
        solutions = low_rank.compensate(method, scaled, solutions)
    return {
        name: replace(
            solution,
            weight=format.wrap(solution.weight, exponents[name]),
            target=None if solution.target is None else shifted(solution.target, exponents[name]),
        )
        for name, solution in solutions.items()
    }

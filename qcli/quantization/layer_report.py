"""What a method achieved on one layer: its weight checked, its error measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.core.formats._tables import SMALLEST_SCALE
from qcli.core.weight import LARGEST_SCALE
from qcli.models.manifest import LayerReport
from qcli.utils.errors import QcliError, UsageError


def layer_report(name: str, method: Method, solution: Solution, original: Tensor, group: LinearGroup) -> LayerReport:
    """Check a solution and measure its error.

    Args:
        original: float32 `[out, in]`, the layer's own weight.
        group: with the Hessian of the layer's input, if the method read data.

    Raises:
        UsageError: the weight needs scales beyond float16's range.
        QcliError: the weight is not valid in its format; names the layer.
    """
    weight = solution.weight
    target = original if solution.target is None else solution.target
    _require_scales_in_range(name, solution, target)
    try:
        weight.check()
    except QcliError as problem:
        raise type(problem)(f"{name}: {problem.message}", hint=problem.hint) from None
    imprecise = weight.format.imprecise_scales(weight, target)
    note = f"{imprecise} scales are too small for float16's full precision; row_exponents: true keeps it"
    difference = target - weight.dense()
    if group.hessian is not None:
        error = ((difference @ group.hessian) * difference).sum()
        size, measure = ((target @ group.hessian) * target).sum(), "output"
    else:
        error, size, measure = difference.square().sum(), target.square().sum(), "weight"
    return LayerReport(
        name=name,
        method=method.name,
        spec=weight.format.spec(),
        bits_per_weight=weight.format.bits_per_weight(weight.shape),
        error=float(error / size) if float(size) else 0.0,
        measure=measure,
        fallbacks=[*solution.fallbacks, note] if imprecise else solution.fallbacks,
    )


def _require_scales_in_range(name: str, solution: Solution, target: Tensor) -> None:
    """Raise UsageError if a finite weight is too large for its format: its scales are infinite, or were clipped."""
    largest = float(target.abs().max())
    halves = [table for table in solution.weight.tables.values() if table.dtype == torch.float16]
    fits = largest <= solution.weight.format.largest_weight and all(bool(table.isfinite().all()) for table in halves)
    if fits or not math.isfinite(largest):
        return
    raise UsageError(
        f"{name}: weights of up to {largest:.3g} need scales beyond float16's range, "
        f"{SMALLEST_SCALE:.2g} to {LARGEST_SCALE:g}",
        hint=f"store exponents of its rows: an override with `match: {name}` and `method: {{row_exponents: true}}`; "
        "or keep it in full precision: `dense: true`",
    )

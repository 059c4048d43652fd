"""What a method achieved on one layer: its weight checked, its error measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.algorithms.solvers.output_error import row_output_errors
from qcli.core.formats._tables import SMALLEST_SCALE
from qcli.core.weight import LARGEST_SCALE, QuantizedWeight
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
    measured = _measure(weight, target, group.hessian)
    if measured.too_large:
        raise UsageError(
            f"{name}: weights of up to {measured.largest:.3g} need scales beyond float16's range, "
            f"{SMALLEST_SCALE:.2g} to {LARGEST_SCALE:g}",
            hint=f"store exponents of its rows: an override with `match: {name}` and `method: {{row_exponents: true}}`"
            "; or keep it in full precision: `dense: true`",
        )
    try:
        weight.check()
    except QcliError as problem:
        raise type(problem)(f"{name}: {problem.message}", hint=problem.hint) from None
    note = f"{measured.imprecise} scales are too small for float16's full precision; row_exponents: true keeps it"
    return LayerReport(
        name=name,
        method=method.name,
        spec=weight.format.spec(),
        bits_per_weight=weight.format.bits_per_weight(weight.shape),
        error=measured.error,
        measure="weight" if group.hessian is None else "output",
        fallbacks=[*solution.fallbacks, note] if measured.imprecise else solution.fallbacks,
    )


@dataclass(frozen=True)
class _Measured:
    """What is read off a layer, all at once: on a GPU every reading waits for all work before it.

    Attributes:
        largest: magnitude of its weights.
        too_large: whether it is finite and needs scales beyond float16's: they are infinite, or were clipped.
        imprecise: number of scales too small for float16's full precision.
        error: squared error, relative.
    """

    largest: float
    too_large: bool
    imprecise: int
    error: float


def _measure(weight: QuantizedWeight, target: Tensor, hessian: Tensor | None) -> _Measured:
    difference = target - weight.dense()
    halves = [table.isfinite().all() for table in weight.tables.values() if table.dtype == torch.float16]
    values = [
        target.abs().max(),
        weight.format.imprecise_scales(weight, target),
        row_output_errors(difference, hessian).sum(),
        row_output_errors(target, hessian).sum(),
        *halves,
    ]
    largest, imprecise, error, size, *finite = torch.stack([value.double() for value in values]).tolist()
    return _Measured(
        largest,
        math.isfinite(largest) and not (largest <= weight.format.largest_weight and all(finite)),
        int(imprecise),
        error / size if size else 0.0,
    )

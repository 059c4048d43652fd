"""What a method achieved on one layer: its weight checked, its error measured."""

from __future__ import annotations

from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.models.manifest import LayerReport
from qcli.utils.errors import QcliError


def layer_report(name: str, method: Method, solution: Solution, original: Tensor, group: LinearGroup) -> LayerReport:
    """Check a solution and measure its error.

    Args:
        original: float32 `[out, in]`, the layer's own weight.
        group: with the Hessian of the layer's input, if the method read data.

    Raises:
        QcliError: the weight is not valid in its format; names the layer.
    """
    weight = solution.weight
    try:
        weight.check()
    except QcliError as problem:
        raise type(problem)(f"{name}: {problem.message}", hint=problem.hint) from None
    target = original if solution.target is None else solution.target
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
        fallbacks=solution.fallbacks,
    )

"""What happened to one layer, and how far its quantized weight is from what was wanted of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.utils.errors import QcliError


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        error: relative squared error of the method's choice, before the block is refined: of the layer's output on
            its real inputs, before any norm, against the method's target (`measure: output`), or of the weight
            itself where no data was used (`measure: weight`).
        fallbacks: every step that did not go as configured.
        facts: what the format reports of the final weight.
    """

    name: str
    method: str
    spec: dict[str, Any]
    bits_per_weight: float
    error: float
    measure: str
    fallbacks: list[str]
    facts: dict[str, float] = field(default_factory=dict)


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

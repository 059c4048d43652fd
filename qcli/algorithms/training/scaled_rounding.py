"""Rounding of weights whose channels are scaled, differentiable in the scales: what TEQ trains through.

Nothing as large as a weight exists but the weight, its codes and the result: all else is made a tile at a time, in the
backward pass once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcli.algorithms.solvers import grid
from qcli.algorithms.solvers.tiles import row_tiles
from qcli.core.formats.affine import Affine


@dataclass(frozen=True)
class Rounding:
    """What does not change while scales are trained.

    Attributes:
        weight: float32 `[rows, width]`, each row a group of the grid.
        places: int64 `[rows]`, which input scales belong to each row.
        format: the grid; a group is a row.
        through_range: whether gradients pass through the range of each group, or rounding errors are constants.
    """

    weight: Tensor
    places: Tensor
    format: Affine
    through_range: bool

    def scaled(self, rows: slice, log_in: Tensor, log_out: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of these rows, `[rows, width]`, and the rows times these."""
        ratio = (log_in.index_select(0, self.places[rows]) - log_out[rows, None]).exp_()
        return ratio, self.weight[rows] * ratio


def scaled_rounding(rounding: Rounding, log_in: Tensor, log_out: Tensor, dtype: torch.dtype) -> Tensor:
    """`Q(W r) / r = W + error / r` with `r = exp(log_in - log_out)`, rounded on min-max grids.

    Args:
        log_in: float32 `[places, width]`.
        log_out: float32 `[rows]`.
        dtype: of the result; arithmetic is float32.

    Returns:
        `[rows, width]`. Gradients take the error as a constant; or, `through_range`, as proportional to the step of its
        grid, hence to the range of its group.
    """
    output: Tensor = _ScaledRounding.apply(log_in, log_out, rounding, dtype)  # type: ignore[no-untyped-call]
    return output


class _ScaledRounding(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, log_in: Tensor, log_out: Tensor, rounding: Rounding, dtype: torch.dtype) -> Tensor:
        weight, format = rounding.weight, rounding.format
        result = torch.empty_like(weight, dtype=dtype)
        codes, tables = torch.empty_like(weight, dtype=torch.uint8), []
        for rows in row_tiles(weight):
            ratio, scaled = rounding.scaled(rows, log_in, log_out)
            codes[rows], found = grid.round_to_minmax(scaled, format)
            error = format.decode(codes[rows], found).sub_(scaled)
            result[rows] = torch.addcdiv(weight[rows], error, ratio)
            tables.append(found)
        if any(context.needs_input_grad):
            whole = {name: torch.cat([part[name] for part in tables]) for name in tables[0]}
            context.save_for_backward(log_in, log_out, codes, *whole.values())
            context.rounding, context.names = rounding, [*whole]
        return result

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        log_in, log_out, codes, *tables = context.saved_tensors
        (gradient,), rounding = gradients, context.rounding
        of_in, of_out = torch.zeros_like(log_in), torch.empty_like(log_out)
        for rows in row_tiles(rounding.weight):
            ratio, scaled = rounding.scaled(rows, log_in, log_out)
            own = {name: table[rows] for name, table in zip(context.names, tables, strict=True)}
            error = rounding.format.decode(codes[rows], own).sub_(scaled)
            of_ratio = error.div_(ratio).mul_(gradient[rows]).neg_()  # by its logarithm
            if rounding.through_range:
                of_ratio += _through_range(scaled, of_ratio.sum(-1).neg_(), rounding.format)
            of_in.index_add_(0, rounding.places[rows], of_ratio)
            of_out[rows] = of_ratio.sum(-1)
        return of_in, of_out.neg_(), None, None


def _through_range(scaled: Tensor, of_range: Tensor, format: Affine) -> Tensor:
    """Gradient by the logarithm of each factor, `[rows, width]`: the range is that of the largest and smallest entries,
    which share it if there are several.

    Args:
        scaled: `[rows, width]`.
        of_range: `[rows]`, gradient by the logarithm of the range.
    """
    if format.zero_point == "none":
        magnitude = scaled.abs()
        largest = magnitude == magnitude.amax(-1, keepdim=True)
        return largest * (of_range / largest.sum(-1))[:, None]
    low, high = scaled.aminmax(dim=-1, keepdim=True)
    highest, lowest = scaled == high, scaled == low
    low.clamp_(max=0)
    high.clamp_(min=0)
    relative = of_range[:, None] / (high - low).clamp_(min=torch.finfo(torch.float32).tiny)
    of_high, of_low = relative * high / highest.sum(-1, keepdim=True), relative * low / lowest.sum(-1, keepdim=True)
    return (highest * of_high).sub_(lowest * of_low)

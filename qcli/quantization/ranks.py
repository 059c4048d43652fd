"""Quantization shared by several processes: what each solves of a group, and losses of samples that lie apart.

Every process runs the same loop on its own samples. Statistics, held-out losses and gradients are summed, so all take
the same decisions and hold the same weights; results differ from those of one process only by the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.low_rank import LowRankCompensation
from qcli.algorithms.method import Method, Solution, Unit
from qcli.algorithms.training.loop import Weights
from qcli.core.weight import QuantizedWeight
from qcli.quantization.solve import solve
from qcli.utils.distributed import Processes

ALONE = Processes(torch.device("cpu"))
"""One process that shares nothing, whatever device it uses."""


def solve_together(
    method: Method, low_rank: LowRankCompensation | None, group: LinearGroup, processes: Processes
) -> dict[str, Solution]:
    """`solve`, each process a part of the group; all get all solutions.

    Args:
        group: with the same statistics in every process.
    """
    if processes.world_size == 1:
        return solve(method, low_rank, group)
    unit: Unit = "layer" if low_rank is not None and method.unit == "row" else method.unit
    own = own_part(group, unit, processes)
    parts = processes.exchange(solve(method, low_rank, own) if own.weights else {})
    return {name: _joined([part[name] for part in parts if name in part]) for name in group.weights}


def own_part(group: LinearGroup, unit: Unit, processes: Processes) -> LinearGroup:
    """What this process solves of a group: an equal share of the rows of each layer, or whole layers.

    Layers go by size, the largest first, to the process that has least to do.
    """
    weights, gap = group.weights, group.output_gap
    if unit == "row":
        shares = {name: processes.share(len(weight)) for name, weight in weights.items()}
        if gap is not None:  # its rows are those of the group's only layer
            (share,) = shares.values()
            gap = gap[share.start : share.stop]
        own = {name: weights[name][share.start : share.stop] for name, share in shares.items() if share}
        return replace(group, weights=own, output_gap=gap)
    tied = [[name] for name in weights] if unit == "layer" else [[*weights]]
    loads, own_names = [0] * processes.world_size, set[str]()
    for names in sorted(tied, key=lambda names: -sum(weights[name].numel() for name in names)):
        rank = loads.index(min(loads))
        loads[rank] += sum(weights[name].numel() for name in names)
        if rank == processes.rank:
            own_names |= {*names}
    return replace(group, weights={name: weight for name, weight in weights.items() if name in own_names})


def _joined(parts: Sequence[Solution]) -> Solution:
    """One layer from solutions of consecutive rows."""
    first = parts[0]
    if len(parts) == 1:
        return first
    weights, targets = [part.weight for part in parts], [part.target for part in parts]
    return Solution(
        QuantizedWeight(
            first.weight.format,
            (sum(weight.shape[0] for weight in weights), first.weight.shape[1]),
            torch.cat([weight.codes for weight in weights]),
            {name: torch.cat([weight.tables[name] for weight in weights]) for name in first.weight.tables},
        ),
        target=None if first.target is None else torch.cat([target for target in targets if target is not None]),
        fallbacks=[*dict.fromkeys(fallback for part in parts for fallback in part.fallbacks)],
    )


def shared_loss(loss: Callable[[Weights], Tensor], weights: Weights, processes: Processes) -> Tensor:
    """The sum of every process's `loss` of the same weights; its gradient is the sum of their gradients."""
    if processes.world_size == 1:
        return loss(weights)
    summed, total = cast("Any", _SummedGradients).apply, cast("Any", _Sum).apply
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    copies = dict(zip(trained, summed(processes, *trained.values()), strict=True))
    result: Tensor = total(processes, loss({**weights, **copies}))
    return result


def no_loss(weights: Weights) -> Tensor:
    """The loss of a process without samples: 0, with gradients of 0."""
    return torch.stack([weight.flatten()[0] for weight in weights.values()]).sum() * 0


class _SummedGradients(torch.autograd.Function):
    """The same tensors; their gradients become sums over the processes, in the same order in all of them, added
    up in float32."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.processes = processes
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sums = [torch.empty(gradient.shape, device=gradient.device).copy_(gradient) for gradient in gradients]
        for each in sums:
            ctx.processes.add_up(each)
        return None, *(each.to(gradient.dtype) for each, gradient in zip(sums, gradients, strict=True))


class _Sum(torch.autograd.Function):
    """The sum over the processes; each has the gradient of its own summand."""

    @staticmethod
    def forward(ctx: Any, processes: Processes, value: Tensor) -> Tensor:
        total = value.clone()
        processes.add_up(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def own_samples(indices: Sequence[int], share: range) -> list[int]:
    """Those of `indices` that lie in this process's share, counted from its start."""
    return [index - share.start for index in indices if index in share]


def add_up_statistics(statistics: Mapping[str, Tensor], tokens: int, processes: Processes) -> int:
    """Replace sums over this process's tokens by sums over those of all; returns the number of these tokens.

    Args:
        statistics: the same ones, float32, in every process.
    """
    if not statistics:
        return tokens
    for name in sorted(statistics):
        processes.add_up(statistics[name])
    return int(processes.sum(tokens))

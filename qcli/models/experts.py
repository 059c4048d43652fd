"""Experts that transformers keeps in one parameter for all of them, and that qcli takes for linear layers of their own.

A module such as `mlp.experts` has `gate_up_proj` and `down_proj` with a matrix for each expert, in several layouts; to
qcli, it has `0.gate_proj`, `0.up_proj`, `0.down_proj`, `1.gate_proj` and so on, each `[out, in]`, as most checkpoints
on the hub have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
GATE_UP = "gate_up_proj"
_BIAS = "_bias"


@dataclass(frozen=True)
class Piece:
    """A matrix or bias of one expert, as part of the parameter of all experts.

    Attributes:
        stack: name of the parameter in the causal LM.
        expert: index along its first dimension.
        rows: which outputs of that expert's matrix: a slice of `[out, ...]`.
        transposed: whether the expert's matrix is `[in, out]`.
    """

    stack: str
    expert: int
    rows: slice
    transposed: bool


@dataclass(frozen=True)
class Experts:
    """A module with the weights of several experts.

    Attributes:
        path: of the module in the causal LM.
        count: number of experts.
        sizes: inputs and outputs `(out, in)` of each projection, by name: `gate_proj` unless experts have no gate,
            `up_proj`, `down_proj`.
        transposed: whether parameters are `[experts, in, out]`.
        interleaved: whether outputs of gate and up alternate in their common parameter; else gate comes first.
        has_bias: whether projections have biases.
        unused: further experts, behind these, that have weights in one parameter alone and compute nothing with them.
    """

    path: str
    count: int
    sizes: dict[str, tuple[int, int]]
    transposed: bool
    interleaved: bool
    has_bias: bool
    unused: int = 0

    @property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """The projections in each parameter, by the parameter's name in the module."""
        return {GATE_UP: (GATE, UP), DOWN: (DOWN,)} if GATE in self.sizes else {UP: (UP,), DOWN: (DOWN,)}

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Every weight and bias by its name in the causal LM, expert by expert: where the parameters have it."""
        for expert in range(self.count):
            for stack, projections in self.stacks.items():
                for index, projection in enumerate(projections):
                    rows = self._rows(index, len(projections), self.sizes[projection][0])
                    name = f"{self.path}.{expert}.{projection}"
                    yield f"{name}.weight", Piece(f"{self.path}.{stack}", expert, rows, self.transposed)
                    if self.has_bias:
                        yield f"{name}.bias", Piece(f"{self.path}.{stack}{_BIAS}", expert, rows, transposed=False)

    def _rows(self, index: int, count: int, size: int) -> slice:
        if self.interleaved:
            return slice(index, count * size, count)
        return slice(index * size, (index + 1) * size, 1)


def find_experts(model: nn.Module) -> list[Experts]:
    """All modules of a model of transformers that hold several experts in a parameter; shapes are all that is read."""
    found = (_experts(path, module) for path, module in model.named_modules())
    return [experts for experts in found if experts is not None]


def _experts(path: str, module: nn.Module) -> Experts | None:
    own = dict(module.named_parameters(recurse=False))
    first, down = own.get(GATE_UP, own.get(UP)), own.get(DOWN)
    if first is None or down is None or first.ndim != 3 or down.ndim != 3 or GATE in own:
        return None
    gated = GATE_UP in own
    rows, columns = first.shape[1:]
    # Classes without transformers' decorator do not say how they are laid out, but shapes do.
    transposed = bool(getattr(module, "is_transposed", gated and rows == down.shape[2]))
    if transposed:
        rows, columns = columns, rows
    sizes = {GATE: (rows // 2, columns), UP: (rows // 2, columns)} if gated else {UP: (rows, columns)}
    out, inputs = down.shape[:0:-1] if transposed else down.shape[1:]
    return Experts(
        path,
        len(down),
        sizes | {DOWN: (out, inputs)},
        transposed,
        interleaved=gated and not getattr(module, "is_concatenated", True),
        has_bias=f"{DOWN}{_BIAS}" in own,
        unused=len(first) - len(down),
    )

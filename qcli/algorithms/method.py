"""The base class of methods, and what they return.

A method is the record of its options. This module and the method files import no torch at the top, so that recipes are
validated in milliseconds; the numerics they call are in `solvers/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.transform import Transform
from qcli.core.weight import Format, QuantizedWeight
from qcli.utils.options import Options

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from qcli.algorithms.refine import Refine

Unit: TypeAlias = Literal["group", "layer", "row"]


@dataclass
class Solution:
    """One layer as a method quantized it.

    Attributes:
        weight: codes and tables.
        target: float32 `[out, in]`, the weight that the codes were fitted to; None: the full-precision weight.
        fallbacks: every step that did not go as configured, in words.
    """

    weight: QuantizedWeight
    target: Tensor | None = None
    fallbacks: list[str] = field(default_factory=list)


class Method(Options):
    """Quantizes linear layers that share an input: chooses codes and tables of one format.

    Attributes:
        unit: the smallest part of a group whose solution depends on no other part, so that several processes can share
            the work; of a `row`, every table has a row too.
    """

    name: ClassVar[str]
    unit: ClassVar[Unit] = "group"

    @property
    def needs(self) -> frozenset[str]:
        """The statistics of `LinearGroup` that the method reads; only these are collected."""
        return frozenset()

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Transforms that belong to the method, applied to each block before it."""
        return ()

    @property
    def refine(self) -> Refine | None:
        """Reconstruction that belongs to the method and follows it, unless the recipe has its own."""
        return None

    @property
    def format(self) -> Format:
        """The format of the quantized layers."""
        raise NotImplementedError

    @property
    def scales_rows(self) -> bool:
        """Whether each row is scaled by a power of two, which is stored with it."""
        return False

    def for_weights_of(self, dtype: str) -> Self:
        """The method for a weight that the model stores in `dtype` (safetensors' name): by default this one."""
        return self

    def unsupported_reason(self, shape: tuple[int, int]) -> str | None:
        """The reason why a weight of `shape` `(out, in)` cannot be quantized with these options; None if it can."""
        return None

    def workspace(self, rows: int, columns: int) -> int:
        """Estimated bytes that `quantize` takes at its peak, besides weights and statistics.

        Args:
            rows: outputs of all layers of a group together.
            columns: their inputs.
        """
        return 10 * rows * columns

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        """Quantize every layer of `group.weights`; the solutions are in the same order."""
        raise NotImplementedError

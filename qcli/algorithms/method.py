"""What a method is given and what it returns: the base class of `methods/`.

A method's validated options are the method. This module and the method files import no torch at the top,
so that recipes are checked in milliseconds; the numerics they call live in `solvers/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.transform import Transform
from qcli.core.weight import Format, QuantizedWeight
from qcli.utils.options import Options

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.algorithms.refine import Refine


@dataclass
class Solution:
    """What a method chose for one layer.

    Attributes:
        weight: codes and tables.
        target: float32 `[out, in]`: what the codes were fitted to, if not the original weight.
        fallbacks: every step that did not go as configured, in words.
    """

    weight: QuantizedWeight
    target: Tensor | None = None
    fallbacks: list[str] = field(default_factory=list)


class Method(Options):
    """Chooses codes and tables for linear layers that share an input."""

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """The moments of `LinearGroup` this method reads; the model stream collects only these."""
        return frozenset()

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Rewrites of each block that belong to the method and come first."""
        return ()

    @property
    def refine(self) -> Refine | None:
        """The reconstruction that belongs to the method and comes last, unless the recipe names another."""
        return None

    @property
    def format(self) -> Format:
        """The format of the layers this method writes."""
        raise NotImplementedError

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of `shape` cannot be quantized with these options; None when it can."""
        return None

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        """One solution for each of `group.weights`."""
        raise NotImplementedError

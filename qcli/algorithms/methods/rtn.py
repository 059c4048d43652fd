"""Round to nearest: each group on a grid of its own; needs no calibration data by default."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from qcli.algorithms.layer_group import DEAD_INPUTS, HESSIAN, LinearGroup
from qcli.algorithms.method import Solution, Unit
from qcli.algorithms.methods._affine import AffineMethod

__all__ = ["RTN"]


class RTN(AffineMethod):
    """Nearest codes on grids that cover each group's range, or on searched ones."""

    name: ClassVar[str] = "rtn"
    unit: ClassVar[Unit] = "row"

    grid: Literal["minmax", "search", "hessian"] = Field(
        default="minmax",
        description="grids that cover each group's range; searched for the least |error|^2.4; or for the least squared "
        "error weighted by the calibrated input energy",
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN}) if self.grid == "hessian" else frozenset()

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        from qcli.algorithms.solvers import grid
        from qcli.core.weight import QuantizedWeight

        solutions, dead = {}, self.grid == "hessian" and group.is_dead
        for name, weight in group.weights.items():
            if self.grid == "minmax":
                codes, tables = grid.round_to_minmax(weight, self.format)
            else:
                if self.grid == "search":
                    tables = grid.search(weight, self.format, power=2.4)
                else:
                    assert group.hessian is not None
                    tables = grid.search(weight, self.format, None if dead else group.hessian.diagonal())
                codes = self.format.encode(weight, tables)
            quantized = QuantizedWeight(self.format, (weight.shape[0], weight.shape[1]), codes, tables)
            solutions[name] = Solution(quantized, fallbacks=[DEAD_INPUTS] if dead else [])
        return solutions

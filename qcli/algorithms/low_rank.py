"""Low-rank compensation (LoRC): the error that codes leave, repaired by a small product of two thin matrices.

The paper (ZeroQuant-V2, arXiv 2303.08302, section 5) takes the SVD of `W - W_hat`. Ours, each an option: the SVD is
weighted by the layer's inputs, it is fitted to what the codes were asked to give (`of: target`), and codes and
factors may take turns (`rounds`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qcli.algorithms.layer_group import HESSIAN, LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.core.formats.low_rank import LowRank
from qcli.core.weight import Format
from qcli.utils.errors import VerificationError
from qcli.utils.options import Options

if TYPE_CHECKING:
    from torch import Tensor


class LowRankCompensation(Options):
    """Adds a product of rank `rank` to every quantized weight, after any method."""

    rank: int = Field(default=8, ge=1, description="directions of the error that are repaired")
    bits: Literal[8, 16] = Field(default=8, description="of a number in the two factors")
    weighted: bool = Field(default=True, description="errors count as the layer's inputs see them; false: plain SVD")
    rounds: int = Field(default=1, ge=1, description="turns of codes and factors; the best is kept")
    of: Literal["target", "weight"] = Field(
        default="target", description="repair what the codes were asked to give, or the original weight"
    )

    @property
    def needs(self) -> frozenset[str]:
        """The moments of `LinearGroup` that are read."""
        return frozenset({HESSIAN}) if self.weighted else frozenset()

    def format(self, base: Format) -> LowRank:
        """The format of a layer that its method stores as `base`."""
        return LowRank.around(base, self.rank, self.bits)

    def misfit(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of `shape` cannot be compensated; None when it can."""
        if self.rank >= min(shape):
            return f"low_rank.rank {self.rank} must be below {min(shape)}, the shorter side of {list(shape)}"
        return None

    def compensate(self, method: Method, group: LinearGroup, solutions: Mapping[str, Solution]) -> dict[str, Solution]:
        """The same solutions with factors, in the format that `format` announces.

        From the second round on, the method quantizes what the factors leave, `T - A B`, and the factors are fitted
        again. `cross = hessian` makes a target refit the identity there: `T` has been refitted already.

        Args:
            method: which made `solutions`.
            group: what it made them of.

        Raises:
            VerificationError: a quantized weight is not finite.
        """
        from qcli.algorithms.solvers.low_rank import weighted_error

        hessian = group.hessian if self.weighted else None
        assert hessian is not None or not self.weighted
        aims = {
            name: group.weights[name] if self.of == "weight" or solution.target is None else solution.target
            for name, solution in solutions.items()
        }
        latest = {name: self._fit(name, aim, solutions[name], hessian) for name, aim in aims.items()}
        best = dict(latest)
        for _ in range(1, self.rounds):
            rest = {name: aim - self._product(latest[name]) for name, aim in aims.items()}
            again = method.quantize(LinearGroup(rest, hessian=group.hessian, cross=group.hessian))
            for name, aim in aims.items():
                fitted = self._fit(name, aim, again[name], hessian)
                latest[name] = replace(
                    fitted,
                    target=solutions[name].target,
                    fallbacks=[*solutions[name].fallbacks, *fitted.fallbacks],
                )
                best[name] = min(
                    best[name], latest[name], key=lambda found: weighted_error(aim - found.weight.dense(), hessian)
                )
        return best

    def _fit(self, name: str, aim: Tensor, solution: Solution, hessian: Tensor | None) -> Solution:
        """`solution` with the factors that bring its weight closest to `aim`."""
        from qcli.algorithms.solvers.low_rank import factors

        format, error = self.format(solution.weight.format), aim - solution.weight.dense()
        if not bool(error.isfinite().all()):
            raise VerificationError(f"{name}: the quantized weight holds NaN or infinity")
        tables = factors(error, hessian, format)
        return replace(solution, weight=format.wrap(solution.weight, tables))

    def _product(self, solution: Solution) -> Tensor:
        format = solution.weight.format
        assert isinstance(format, LowRank)
        return format.product(solution.weight.tables)

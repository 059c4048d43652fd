"""Low-rank compensation (LoRC): the quantization error, approximated by a product of two thin matrices.

ZeroQuant-V2 (arXiv 2303.08302, section 5) takes the SVD of `W - W_hat`. Ours, each an option: the error is weighted by
the layer's inputs (`weighted`), it is measured against the method's target (`of`), and codes and factors are fitted
alternately (`rounds`).
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
    """Adds a low-rank term to every quantized weight, after any method."""

    rank: int = Field(default=8, ge=1, description="rank of the term")
    bits: Literal[8, 16] = Field(default=8, description="bits per entry of the two factors")
    weighted: bool = Field(
        default=True,
        description="minimize the output error on the layer's inputs; false: that of the weight, plain SVD",
    )
    rounds: int = Field(default=1, ge=1, description="alternations of codes and factors; the best one is kept")
    of: Literal["target", "weight"] = Field(
        default="target", description="measure the error against the method's target, or the original weight"
    )

    @property
    def needs(self) -> frozenset[str]:
        """The statistics of `LinearGroup` that are read."""
        return frozenset({HESSIAN}) if self.weighted else frozenset()

    def format(self, base: Format) -> LowRank:
        """The format of a layer that its method stores as `base`."""
        return LowRank.around(base, self.rank, self.bits)

    def unsupported_reason(self, shape: tuple[int, int]) -> str | None:
        """The reason why a weight of `shape` `(out, in)` cannot be compensated; None if it can."""
        if self.rank >= min(shape):
            return f"low_rank.rank {self.rank} must be below {min(shape)}, the shorter side of {list(shape)}"
        return None

    def compensate(self, method: Method, group: LinearGroup, solutions: Mapping[str, Solution]) -> dict[str, Solution]:
        """Add factors to the solutions of a method.

        From the second round on, the method quantizes `T - A B`, the target without the factors, and the factors are
        fitted again. There `cross = hessian` makes a target refit the identity: `T` has been refitted already.

        Args:
            method: the method that made `solutions`.
            group: the layers it quantized, with the statistics of `needs` and of the method.
            solutions: by layer name.

        Returns:
            The solutions in the formats of `format`, same targets; fallbacks of further rounds are added.

        Raises:
            VerificationError: a quantized weight is not finite.
        """
        from qcli.algorithms.solvers.output_error import output_error

        assert group.hessian is not None or not self.weighted
        hessian = group.hessian if self.weighted and not group.is_dead else None
        targets = {
            name: group.weights[name] if self.of == "weight" or solution.target is None else solution.target
            for name, solution in solutions.items()
        }
        latest = {name: self._fit(name, target, solutions[name], hessian) for name, target in targets.items()}
        best = dict(latest)
        for _ in range(1, self.rounds):
            remainders = {name: target - self._product(latest[name]) for name, target in targets.items()}
            requantized = method.quantize(LinearGroup(remainders, hessian=group.hessian, cross=group.hessian))
            for name, target in targets.items():
                fitted = self._fit(name, target, requantized[name], hessian)
                latest[name] = replace(
                    fitted,
                    target=solutions[name].target,
                    fallbacks=[*solutions[name].fallbacks, *fitted.fallbacks],
                )
                best[name] = min(
                    best[name],
                    latest[name],
                    key=lambda choice: output_error(target - choice.weight.dense(), hessian),
                )
        return best

    def _fit(self, name: str, target: Tensor, solution: Solution, hessian: Tensor | None) -> Solution:
        """`solution` with the factors that bring its weight closest to `target`."""
        from qcli.algorithms.solvers.low_rank import fit_factors

        format, error = self.format(solution.weight.format), target - solution.weight.dense()
        if not bool(error.isfinite().all()):
            raise VerificationError(f"{name}: the quantized weight holds NaN or infinity")
        tables = fit_factors(error, hessian, format)
        return replace(solution, weight=format.wrap(solution.weight, tables))

    def _product(self, solution: Solution) -> Tensor:
        format = solution.weight.format
        assert isinstance(format, LowRank)
        return format.product(solution.weight.tables)

"""Options and first steps that every method with error feedback shares: what to aim at, and under which Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import CROSS, HESSIAN, RESIDUAL_CROSS, LinearGroup
from qcli.algorithms.method import Method, Solution

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from qcli.core.weight import QuantizedWeight


@dataclass
class Problem:
    """Linears that read one input as one matrix, rows stacked.

    Attributes:
        target: float32 `[rows, in]`, what the codes should stand for.
        hessian: `[in, in]`, zeros where inputs are always 0.
        order: columns in the order of their quantization, int64 `[in]`.
        factor: `U` of the Hessian in this order (`solvers.feedback.inverse_factor`); None: no damping helped.
        fallbacks: every step that did not go as configured.
    """

    target: Tensor
    hessian: Tensor
    order: Tensor
    factor: Tensor | None
    fallbacks: list[str]


class ErrorFeedback(Method):
    """A method that quantizes column by column under the Hessian of the layer's inputs."""

    refit_target: bool = Field(default=True, description="aim at the full-precision outputs on quantized inputs")
    residual: bool | Literal["auto"] = Field(
        default="auto", description="layers that write to the residual stream repair its error; auto: with refit_target"
    )
    damping: float = Field(default=0.1, gt=0, le=1, description="relative to the Hessian's mean diagonal")
    ridge: float = Field(default=0.4, gt=0, description="of the target refit, relative to the mean diagonal")

    @model_validator(mode="after")
    def _residual_needs_a_target(self) -> Self:
        if self.residual is True and not self.refit_target:
            raise ValueError("residual is a part of refit_target: leave residual at auto, or set refit_target to true")
        return self

    @property
    def repairs_residual(self) -> bool:
        """What `residual` comes to."""
        return self.refit_target and self.residual is not False

    @property
    def needs(self) -> frozenset[str]:
        needs = {HESSIAN}
        if self.refit_target:
            needs.add(CROSS)
        if self.repairs_residual:
            needs.add(RESIDUAL_CROSS)
        return frozenset(needs)

    def problem(self, group: LinearGroup, column_order: str, group_width: int) -> Problem:
        """What error feedback starts from.

        Args:
            column_order: as for `solvers.feedback.column_order`.
            group_width: likewise.
        """
        import torch

        from qcli.algorithms.solvers import feedback
        from qcli.algorithms.solvers.target import refit

        assert group.hessian is not None
        stacked = torch.cat(list(group.weights.values()))
        regular, target = feedback.without_dead_inputs(group.hessian, stacked)
        fallbacks = []
        if self.refit_target:
            assert group.cross is not None
            residual = group.residual_cross if self.repairs_residual else None
            target, ridge = refit(target, group.hessian, group.cross, residual, self.ridge)
            _, target = feedback.without_dead_inputs(group.hessian, target)
            if ridge != self.ridge:
                fallbacks.append(f"ridge raised to {ridge:g}")
        order = feedback.column_order(group.hessian, group_width, column_order)
        factor, damping = feedback.inverse_factor(regular[order][:, order], self.damping)
        if factor is None:
            fallbacks.append("Hessian not positive definite at any damping: rounded to nearest")
        elif damping != self.damping:
            fallbacks.append(f"damping raised to {damping:g}")
        return Problem(target, group.hessian, order, factor, fallbacks)


class LayerByLayer(ErrorFeedback):
    """A method with error feedback whose layers have tables of their own."""

    error_feedback: bool = Field(default=True, description="columns to come absorb each column's error")

    def start(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Tables of `format` that the codes of one layer are chosen on.

        Args:
            target: float32 `[out, in]`.
            importance: float32 `[in]`, `diag(H)`.
        """
        raise NotImplementedError

    def finish(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        """The layer once its codes are fixed, and what did not go as configured.

        Args:
            target: float32 `[out, in]`.
            hessian: `[in, in]`.
        """
        raise NotImplementedError

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        """All layers of the group share one factor; each is solved on its own."""
        from qcli.algorithms.solvers import feedback
        from qcli.core.weight import QuantizedWeight

        problem = self.problem(group, "static", 0)
        solutions, first = {}, 0
        for name, weight in group.weights.items():
            target = problem.target[first : first + len(weight)]
            first += len(weight)
            tables = self.start(target, problem.hessian.diagonal())
            if self.error_feedback and problem.factor is not None:
                codes, _ = feedback.quantize_columns(target, problem.factor, problem.order, self.format, tables)
            else:
                codes = self.format.encode(target, tables)
            found = QuantizedWeight(self.format, (target.shape[0], target.shape[1]), codes, tables)
            found, notes = self.finish(target, found, problem.hessian)
            fallbacks = [*problem.fallbacks, *notes]
            solutions[name] = Solution(found, target if self.refit_target else None, fallbacks)
        return solutions

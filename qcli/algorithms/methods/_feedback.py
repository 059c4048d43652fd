"""Options and first steps of every method with error feedback: the target, the Hessian and its factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import CROSS, DEAD_INPUTS, HESSIAN, OUTPUT_GAP, LinearGroup
from qcli.algorithms.method import Method, Solution

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

NORMAL_NUMBERS = 1 << 26  # in normal equations that are solved together: half a gigabyte


@dataclass
class Problem:
    """The layers of a group as one matrix, rows stacked, with what error feedback needs.

    Attributes:
        target: float32 `[rows, in]`, the weight to quantize; dead columns are 0.
        hessian: `[in, in]`, as collected; the identity if all inputs are dead.
        order: int64 `[in]`, the columns in the order of their quantization.
        factor: `U` of the Hessian in this order (see `solvers.feedback.inverse_factor`); None: no damping sufficed.
        fallbacks: every step that did not go as configured.
    """

    target: Tensor
    hessian: Tensor
    order: Tensor
    factor: Tensor | None
    fallbacks: list[str]


class ErrorFeedback(Method):
    """A method that quantizes column by column with error feedback under the Hessian of the layer's inputs."""

    refit_target: bool = Field(
        default=True, description="fit the full-precision outputs on the quantized model's inputs, not the weight"
    )
    residual: bool | Literal["auto"] = Field(
        default="auto",
        description="layers that write to the residual stream also correct its error; auto: as refit_target",
    )
    damping: float = Field(default=0.1, gt=0, le=1, description="damping, relative to the Hessian's mean diagonal")
    ridge: float = Field(
        default=0.4, gt=0, description="ridge of the target refit, relative to the Hessian's mean diagonal"
    )

    @model_validator(mode="after")
    def _residual_needs_target_refit(self) -> Self:
        if self.residual is True and not self.refit_target:
            raise ValueError("residual is a part of refit_target: leave residual at auto, or set refit_target to true")
        return self

    @property
    def corrects_residual(self) -> bool:
        """The value of `residual` with `auto` resolved."""
        return self.refit_target and self.residual is not False

    @property
    def needs(self) -> frozenset[str]:
        if not self.refit_target:
            return frozenset({HESSIAN})
        return frozenset({HESSIAN, OUTPUT_GAP if self.corrects_residual else CROSS})

    def refitted(self, columns: int) -> int:
        """Number of table entries of a row that least squares solve for at once, for layers of so many inputs."""
        return 0

    def workspace(self, rows: int, columns: int) -> int:
        """The larger of two steps: the factor of the Hessian and its inverse, in float32 where that is precise enough;
        and what is fitted to the codes, when both are gone."""
        factors = 8 * columns**2 + 5 * rows * columns
        normal = 24 * min(NORMAL_NUMBERS, rows * self.refitted(columns) ** 2)
        return max(factors, 16 * rows * columns + normal)

    def prepare(self, group: LinearGroup, column_order: str, group_width: int) -> Problem:
        """Stack the layers, refit their target, and factor the damped Hessian.

        Args:
            group: with the statistics of `needs`.
            column_order: `kind` of `solvers.feedback.column_order`.
            group_width: columns per group, for `group-aware`.
        """
        import torch

        from qcli.algorithms.solvers import feedback
        from qcli.algorithms.solvers.target import refit_target

        assert group.hessian is not None
        stacked = torch.cat(list(group.weights.values()))
        hessian, fallbacks, dead = group.hessian, list[str](), group.is_dead
        if dead:
            hessian = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            fallbacks.append(DEAD_INPUTS)
        regular, target = feedback.without_dead_inputs(hessian, stacked)
        del stacked  # at 70B the rows of a group take 1.9 GB
        if self.refit_target and not dead:
            gap = group.output_gap if self.corrects_residual else None
            if gap is None:
                assert group.cross is not None
                gap = target @ (group.cross - hessian)
            target, ridge = refit_target(target, hessian, gap, self.ridge)
            if regular is not hessian:
                _, target = feedback.without_dead_inputs(hessian, target)
            if ridge != self.ridge:
                fallbacks.append(f"ridge raised to {ridge:g}")
        order = feedback.column_order(hessian, group_width, column_order)
        factor, damping = feedback.inverse_factor(regular, self.damping, order)
        if factor is None:
            fallbacks.append("Hessian not positive definite at any damping: rounded to nearest")
        elif damping != self.damping:
            fallbacks.append(f"damping raised to {damping:g}")
        return Problem(target, hessian, order, factor, fallbacks)


class PerLayerFeedback(ErrorFeedback):
    """A method with error feedback that fits tables to each layer of a group on its own."""

    error_feedback: bool = Field(
        default=True,
        description="columns still to be quantized compensate each column's error; false: round to nearest",
    )

    def fit_tables(self, target: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Tables of `format` that the codes of one layer are chosen with.

        Args:
            target: float32 `[out, in]`.
            importance: float32 `[in]`, `diag(H)`.
        """
        raise NotImplementedError

    def fit_layers(self, stacked: Tensor, rows: Sequence[int], importance: Tensor) -> list[dict[str, Tensor]]:
        """`fit_tables` of each layer.

        Args:
            stacked: float32 `[sum of rows, in]`, their targets.
            rows: of each layer.
        """
        return [self.fit_tables(target, importance) for target in stacked.split([*rows])]

    def refit(self, target: Tensor, weight: QuantizedWeight, hessian: Tensor) -> tuple[QuantizedWeight, list[str]]:
        """The layer with its tables refitted to its codes, and the fallbacks of this step.

        Args:
            target: float32 `[out, in]`.
            weight: with final codes.
            hessian: `[in, in]`.
        """
        raise NotImplementedError

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        """The layers share the factored Hessian: their columns are quantized as those of one matrix, rows stacked."""
        from qcli.algorithms.solvers import feedback
        from qcli.core.weight import QuantizedWeight

        problem = self.prepare(group, "static", 0)
        rows = [len(weight) for weight in group.weights.values()]
        targets = problem.target.split(rows)
        tables = self.fit_layers(problem.target, rows, problem.hessian.diagonal())
        if self.error_feedback and problem.factor is not None:
            parts = list(zip(rows, tables, strict=True))
            stacked = feedback.quantize_columns(problem.target, problem.factor, problem.order, self.format, parts)
            codes = list(stacked.split(rows))
        else:
            codes = [self.format.encode(target, own) for target, own in zip(targets, tables, strict=True)]
        problem.factor = None  # as large as the Hessian, and read no more
        solutions = {}
        for name, target, own_codes, own_tables in zip(group.weights, targets, codes, tables, strict=True):
            shape = target.shape[0], target.shape[1]
            quantized = QuantizedWeight(self.format, shape, own_codes, own_tables)
            weight, fallbacks = self.refit(target, quantized, problem.hessian)
            solutions[name] = Solution(weight, target if self.refit_target else None, [*problem.fallbacks, *fallbacks])
        return solutions

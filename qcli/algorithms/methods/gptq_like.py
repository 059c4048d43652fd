"""GPTQ (arXiv 2210.17323) with the additions that make it hold at 2 and 3 bits.

The default has five steps, each of which can be switched off: the target is refitted to the inputs that the layer will
get in the quantized model (`refit_target`), layers that write to the residual stream also correct its error
(`residual`), grids are searched under `diag(H)` (`grid`), columns are quantized with error feedback by decreasing
importance (`column_order`), and all scales of a row are refitted at fixed codes (`refit_tables`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import CROSS, LinearGroup
from qcli.algorithms.method import Solution, Unit
from qcli.algorithms.methods._affine import AffineMethod
from qcli.algorithms.methods._feedback import ErrorFeedback, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.algorithms.solvers.feedback import DynamicTables

__all__ = ["GPTQLike"]


class GPTQLike(AffineMethod, ErrorFeedback):
    """Uniform grids, codes by error feedback under the Hessian of the layer's inputs."""

    name: ClassVar[str] = "gptq-like"
    unit: ClassVar[Unit] = "row"

    column_order: Literal["static", "group-aware", "none"] = Field(
        default="static",
        description="order of columns: by decreasing input energy; the same by groups and inside them; as stored",
    )
    grid: Literal["search", "minmax"] = Field(
        default="search", description="grids searched under the input energy, or covering each group's range"
    )
    refit_tables: bool = Field(default=True, description="least squares of all scales of a row at fixed codes")
    gptaq_alpha: float = Field(
        default=0.0, ge=0, le=1, description="weight of GPTAQ's asymmetric term; instead of refit_target"
    )

    @model_validator(mode="after")
    def _one_correction_of_inputs(self) -> GPTQLike:
        if self.gptaq_alpha and self.refit_target:
            raise ValueError("gptaq_alpha replaces refit_target: set refit_target to false")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({CROSS} if self.gptaq_alpha else frozenset())

    def refitted(self, columns: int) -> int:
        tables = 2 if self.format.zero_point == "float" else 1
        return tables * self.format.groups(columns) if self.refit_tables else 0

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        """All layers are solved as one matrix, rows stacked."""
        import torch

        from qcli.algorithms.solvers import feedback, grid
        from qcli.core.weight import QuantizedWeight

        width = self.format.group_width(next(iter(group.weights.values())).shape[1])
        problem = self.prepare(group, self.column_order, width)
        target, hessian, order = problem.target, problem.hessian, problem.order
        tables = self._fit_grids(target, hessian.diagonal())
        usable = torch.ones(len(target), dtype=torch.bool)
        if problem.factor is None:
            codes = self.format.encode(target, tables)
        else:
            asymmetry = None
            if self.gptaq_alpha and not group.is_dead:
                assert group.cross is not None
                cross = group.cross[order][:, order]
                asymmetry = feedback.asymmetric_term(hessian[order][:, order], cross, problem.factor, self.gptaq_alpha)
            dynamic = self.column_order != "static" and width < target.shape[1]
            codes = feedback.quantize_columns(
                target,
                problem.factor,
                order,
                self.format,
                [(len(target), tables)],
                asymmetry=asymmetry,
                dynamic=self._dynamic_grids(problem, tables, width) if dynamic else None,
            )
            problem.factor = None  # as large as the Hessian, and read no more
            if self.refit_tables:
                tables, usable = grid.refit(target, codes, tables, self.format, hessian)

        solutions, first = {}, 0
        kept = torch.stack([(~rows).sum() for rows in usable.split([*map(len, group.weights.values())])]).tolist()
        for (name, weight), unusable in zip(group.weights.items(), kept, strict=True):
            rows = slice(first, first := first + len(weight))
            note = f"scale refit unusable in {unusable} of {len(weight)} rows: kept the searched scales"
            solutions[name] = Solution(
                QuantizedWeight(
                    self.format,
                    (weight.shape[0], weight.shape[1]),
                    codes[rows],
                    {key: table[rows] for key, table in tables.items()},
                ),
                target=target[rows] if self.refit_target else None,
                fallbacks=[*problem.fallbacks, note] if unusable else problem.fallbacks,
            )
        return solutions

    def _fit_grids(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Tables for `weight` `[out, in]` under `importance` `[in]`."""
        from qcli.algorithms.solvers import grid

        if self.grid == "minmax":
            return grid.minmax(weight, self.format)
        return grid.search(weight, self.format, importance)

    def _dynamic_grids(self, problem: Problem, tables: dict[str, Tensor], width: int) -> DynamicTables:
        """Each group's grid fitted to its weights after the feedback so far, by updating `tables` in place."""
        from qcli.algorithms.solvers.feedback import DynamicTables

        importance = problem.hessian.diagonal()

        def fit(columns: Tensor, values: Tensor) -> Mapping[str, Tensor]:
            stored_order = columns.argsort()
            fitted = self._fit_grids(values[:, stored_order].contiguous(), importance[columns[stored_order]])
            for name, table in fitted.items():
                tables[name][:, int(columns.min()) // width] = table[:, 0]
            return tables

        return DynamicTables(_group_ends(problem.order, width), fit)


def _group_ends(order: Tensor, width: int) -> list[int]:
    """Positions in `order` at which groups of `width` columns end."""
    groups = (order // width).tolist()
    return [end for end in range(1, len(groups) + 1) if end == len(groups) or groups[end] != groups[end - 1]]

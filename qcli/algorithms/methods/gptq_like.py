"""GPTQ, and what makes it hold at 2 and 3 bits.

The default runs five steps, each of which can be switched off: the target is refitted to the inputs that the
layer will really get (`refit_target`), layers that write to the residual stream also repair the error it carries
(`residual`), grids are searched under `diag(H)` (`grid`), columns are quantized with error feedback in order of
importance (`column_order`), and all scales of a row are solved for once the codes are fixed (`refit_tables`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import CROSS, LinearGroup
from qcli.algorithms.method import Solution
from qcli.algorithms.methods._affine import AffineMethod
from qcli.algorithms.methods._feedback import ErrorFeedback

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GPTQLike"]


class GPTQLike(AffineMethod, ErrorFeedback):
    """Error feedback under the Hessian of the layer's inputs."""

    name: ClassVar[str] = "gptq-like"

    column_order: Literal["static", "group-aware", "none"] = Field(
        default="static", description="columns by input energy; groups by energy; as stored"
    )
    grid: Literal["search", "minmax"] = Field(
        default="search", description="grids searched under the input energy, or spanning each group's range"
    )
    refit_tables: bool = Field(default=True, description="least squares of all scales of a row at fixed codes")
    gptaq_alpha: float = Field(
        default=0.0, ge=0, le=1, description="weight of GPTAQ's asymmetric term; instead of refit_target"
    )

    @model_validator(mode="after")
    def _corrections_agree(self) -> GPTQLike:
        if self.gptaq_alpha and self.refit_target:
            raise ValueError("gptaq_alpha replaces refit_target: set refit_target to false")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({CROSS} if self.gptaq_alpha else frozenset())

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        """All layers of the group share one factor and are solved as one matrix, rows stacked."""
        import torch

        from qcli.algorithms.solvers import feedback, grid, tables
        from qcli.core.weight import QuantizedWeight

        width = self.format.group_width(next(iter(group.weights.values())).shape[1])
        problem = self.problem(group, self.column_order, width)
        target, hessian, order, factor = problem.target, problem.hessian, problem.order, problem.factor

        def fit(weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
            if self.grid == "minmax":
                return grid.minmax(weight, self.format)
            return grid.search(weight, self.format, importance)

        start = fit(target, hessian.diagonal())
        usable = torch.ones(len(target), dtype=torch.bool)
        if factor is None:
            codes, final = self.format.encode(target, start), dict(start)
        else:
            asymmetry = None
            if self.gptaq_alpha:
                assert group.cross is not None
                cross = group.cross[order][:, order]
                asymmetry = feedback.asymmetric_term(hessian[order][:, order], cross, factor, self.gptaq_alpha)

            def regrid(columns: Tensor, values: Tensor) -> Mapping[str, Tensor]:
                """The grid of the group that starts now, fitted to its weights as error feedback has left them."""
                natural = columns.argsort()
                fresh = fit(values[:, natural].contiguous(), hessian.diagonal()[columns[natural]])
                for name, table in fresh.items():
                    start[name][:, int(columns.min()) // width] = table[:, 0]
                return start

            dynamic = self.column_order != "static" and width < target.shape[1]
            codes, fitted = feedback.quantize_columns(
                target,
                factor,
                order,
                self.format,
                start,
                asymmetry=asymmetry,
                grid_of=regrid if dynamic else None,
                spans=_group_ends(order, width) if dynamic else None,
            )
            final = dict(fitted)
            if self.refit_tables:
                final, usable = tables.refit_tables(target, codes, final, self.format, hessian)

        solutions, first = {}, 0
        for name, weight in group.weights.items():
            rows = slice(first, first := first + len(weight))
            kept = int((~usable[rows]).sum())
            note = [f"scale refit unusable in {kept} of {len(weight)} rows: kept the searched scales"] if kept else []
            solutions[name] = self.solution(
                QuantizedWeight(
                    self.format,
                    (weight.shape[0], weight.shape[1]),
                    codes[rows],
                    {key: table[rows] for key, table in final.items()},
                ),
                target=target[rows] if self.refit_target else None,
                fallbacks=[*problem.fallbacks, *note],
            )
        return solutions


def _group_ends(order: Tensor, width: int) -> list[int]:
    """Positions in `order` after which the next group begins."""
    groups = (order // width).tolist()
    return [end for end in range(1, len(groups) + 1) if end == len(groups) or groups[end] != groups[end - 1]]

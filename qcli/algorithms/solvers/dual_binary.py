"""Scales of two binary planes: DB-LLM's flexible dual binarization (arXiv 2402.11960)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.solvers.least_squares import fit_factors
from qcli.algorithms.solvers.output_error import row_output_errors
from qcli.algorithms.solvers.tiles import row_tiles, tile_size
from qcli.core.formats.dual_binary import ALPHA1, ALPHA2, DualBinary
from qcli.core.weight import QuantizedWeight

_SCALES = tuple(2 * (0.3 + 0.05 * step) for step in range(15))  # ours: INT2 scales tried, over the mean magnitude
_ROUNDS = 6  # ours: alternations of codes and alphas
_RIDGE = 1e-6  # of each group's normal equations, relative to their trace
_MIN_IMPORTANCE = 1e-6  # relative to the mean: every column keeps some weight


def fit(weight: Tensor, format: DualBinary, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Alphas with a small `sum importance * (w - w_hat)^2` in each group.

    As in the paper, an INT2 scale s is split in two, `alpha1 = 2s` and `alpha2 = -s`. Ours: s is searched instead of
    taken from the largest weight, then codes and least squares of both alphas alternate.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]`, such as `diag(H)`; None: all ones.

    Returns:
        Tables of `format`.
    """
    ones = weight.new_ones(weight.shape[1]) if importance is None else importance
    weights = format.grouped(ones.clamp(min=_MIN_IMPORTANCE * ones.mean())[None])[0][:, None]
    parts = [_fit_rows(format.grouped(weight[rows]), weights, format) for rows in row_tiles(weight)]
    return {name: torch.cat([part[name] for part in parts]) for name in (ALPHA1, ALPHA2)}


def _fit_rows(rows: Tensor, importance: Tensor, format: DualBinary) -> dict[str, Tensor]:
    """`fit` for `rows` `[rows, groups, n]`; `importance` `[groups, 1, n]` is 0 in the padding."""
    groups = rows.permute(1, 2, 0).contiguous()  # rows last: operations on a group's table then vectorize
    magnitude = (importance @ groups.abs()).squeeze(1) / importance.sum(-1)
    scale = magnitude * torch.tensor(_SCALES, device=rows.device)[:, None, None]
    best = _BestAlphas(groups, importance, format)
    best.consider(*((2 * scale, -scale) if format.levels == "fdb" else (scale, scale / 2)))
    for _ in range(_ROUNDS):
        best.consider(*(alpha[None] for alpha in _fit_groups(groups, importance, *best.planes())))
    return {ALPHA1: best.alpha1.T.half(), ALPHA2: best.alpha2.T.half()}


def published(weight: Tensor, format: DualBinary) -> dict[str, Tensor]:
    """The alphas that DB-LLM starts at: `alpha1 = 2s`, `alpha2 = -s`, with `s` half of a group's largest magnitude.

    The paper's levels -s, 0, s, 2s are wide for most weights, which leaves the planes many zeros; `fit` trades these
    for a smaller error.

    Args:
        weight: float32 `[out, in]`.
        format: with `levels: fdb`.

    Returns:
        Tables of `format`.
    """
    largest = format.grouped(weight).abs().amax(-1)
    alpha1, alpha2 = format.ordered(largest, -largest / 2)
    return {ALPHA1: alpha1.half(), ALPHA2: alpha2.half()}


def refit(target: Tensor, weight: QuantizedWeight, format: DualBinary, hessian: Tensor) -> tuple[QuantizedWeight, int]:
    """Exact least squares of all alphas of a row under H at fixed planes (ours); rows that gain nothing keep theirs.

    Args:
        target: float32 `[out, in]`.
        hessian: `[in, in]`.

    Returns:
        The new weight, and the number of rows whose solution was unusable.
    """
    current = [weight.tables[name].float() for name in (ALPHA1, ALPHA2)]
    planes = list(format.planes(weight.codes))
    solution, usable = fit_factors(target, planes, current, hessian, format)
    alphas = [
        table.half()
        for table in format.ordered(
            *(new.where(usable[:, None], old) for new, old in zip(solution, current, strict=True))
        )
    ]
    refitted = QuantizedWeight(format, weight.shape, weight.codes, dict(zip((ALPHA1, ALPHA2), alphas, strict=True)))
    before, after = (row_output_errors(target - choice.dense(), hessian) for choice in (weight, refitted))
    better = (after < before)[:, None]
    tables = {name: refitted.tables[name].where(better, weight.tables[name]) for name in (ALPHA1, ALPHA2)}
    return QuantizedWeight(format, weight.shape, weight.codes, tables), int((~usable).sum())


class _BestAlphas:
    """The best alphas of each group among those considered, rounded as stored.

    Args:
        groups: `[groups, n, rows]`.
        importance: `[groups, 1, n]`.

    Attributes:
        alpha1, alpha2: float32 `[groups, rows]`.
    """

    def __init__(self, groups: Tensor, importance: Tensor, format: DualBinary) -> None:
        self.groups, self.importance, self.format = groups, importance, format
        self.error = groups.new_full((len(groups), groups.shape[2]), torch.inf)
        self.alpha1 = self.alpha2 = torch.ones_like(self.error)

    def planes(self) -> tuple[Tensor, Tensor]:
        """The factors of the best alphas, float32 `[groups, n, rows]`."""
        bits = self.format.code_bits(self.groups, self.alpha1[:, None], self.alpha2[:, None])
        first, second = (self.format.factor(bit).float() for bit in bits)
        return first, second

    def consider(self, alpha1: Tensor, alpha2: Tensor) -> None:
        """Take the best of these alphas, `[candidates, groups, rows]`, in the groups where their error is smaller."""
        alpha1, alpha2 = (table.half().float() for table in self.format.ordered(alpha1, alpha2))
        together = max(1, tile_size(self.groups) // self.groups.numel())
        for first, second in zip(alpha1.split(together), alpha2.split(together), strict=True):
            middle, larger, smaller = (table[:, :, None] for table in self.format.as_signs(first, second))
            difference = self.groups - middle
            for magnitude in (larger, smaller):
                difference.sub_(torch.copysign(magnitude, difference))
            total = (self.importance @ difference.square_()).squeeze(2)
            error, index = total.min(0, keepdim=True)
            better = error[0] < self.error
            self.error = torch.where(better, error[0], self.error)
            self.alpha1 = torch.where(better, first.gather(0, index)[0], self.alpha1)
            self.alpha2 = torch.where(better, second.gather(0, index)[0], self.alpha2)


def _fit_groups(groups: Tensor, importance: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The alphas `[groups, rows]` with the least weighted squared error at fixed planes, by Cramer's rule.

    Args:
        groups, first, second: `[groups, n, rows]`.
        importance: `[groups, 1, n]`.
    """

    def inner(left: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return (importance @ (left * torch.stack(others))).squeeze(2).double().unbind()

    (aa, ab, at), (bb, bt) = inner(first, first, second, groups), inner(second, second, groups)
    ridge = _RIDGE * (aa + bb) + 1e-30
    aa, bb = aa + ridge, bb + ridge
    determinant = aa * bb - ab * ab
    return ((bb * at - ab * bt) / determinant).float(), ((aa * bt - ab * at) / determinant).float()

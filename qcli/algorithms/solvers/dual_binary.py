"""Scales of two binary planes: DB-LLM's flexible dual binarization (arXiv 2402.11960)."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.solvers.least_squares import fit_factors
from qcli.algorithms.solvers.output_error import row_output_errors
from qcli.core.formats.dual_binary import ALPHA1, ALPHA2, DualBinary
from qcli.core.weight import QuantizedWeight

_SCALES = tuple(2 * (0.3 + 0.05 * step) for step in range(15))  # ours: INT2 scales tried, over the mean magnitude
_ROUNDS = 8  # ours: alternations of codes and alphas
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
    groups = format.grouped(weight)
    ones = weight.new_ones(weight.shape[1]) if importance is None else importance
    weights = format.grouped(ones.clamp(min=_MIN_IMPORTANCE * float(ones.mean()))[None])
    magnitude = (groups.abs() * weights).sum(-1) / weights.sum(-1)
    best = _BestAlphas(groups, weights, format)
    for relative in _SCALES:
        scale = relative * magnitude
        alphas = (2 * scale, -scale) if format.levels == "fdb" else (scale, scale / 2)
        best.consider(*alphas)
    for _ in range(_ROUNDS):
        first, second = format.planes(best.codes())
        best.consider(*_fit_groups(groups, weights, first, second))
    return {ALPHA1: best.alpha1.half(), ALPHA2: best.alpha2.half()}


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
    """The best alphas of each group among those considered, rounded as stored: float32 `[out, groups]`."""

    def __init__(self, groups: Tensor, importance: Tensor, format: DualBinary) -> None:
        self.groups, self.importance, self.format = groups, importance, format
        self.error = groups.new_full(groups.shape[:2], torch.inf)
        self.alpha1 = self.alpha2 = groups.new_ones(groups.shape[:2])

    def codes(self) -> Tensor:
        """Codes for the best alphas, uint8 `[out, groups, n]`."""
        return self.format.nearest(self.groups, self.alpha1[..., None], self.alpha2[..., None]).to(torch.uint8)

    def consider(self, alpha1: Tensor, alpha2: Tensor) -> None:
        """Take these alphas in the groups where their error is smaller."""
        alpha1, alpha2 = (table.half().float() for table in self.format.ordered(alpha1, alpha2))
        bits = self.format.code_bits(self.groups, alpha1[..., None], alpha2[..., None])
        first, second = map(self.format.factor, bits)
        difference = first * alpha1[..., None] + second * alpha2[..., None] - self.groups
        error = (difference.square() * self.importance).sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.alpha1 = torch.where(better, alpha1, self.alpha1)
        self.alpha2 = torch.where(better, alpha2, self.alpha2)


def _fit_groups(groups: Tensor, importance: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The alphas with the least weighted squared error of each group at fixed planes, by Cramer's rule."""

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return (left * right * importance).sum(-1).double()

    aa, ab, bb = inner(first, first), inner(first, second), inner(second, second)
    ridge = _RIDGE * (aa + bb) + 1e-30
    aa, bb = aa + ridge, bb + ridge
    at, bt = inner(first, groups), inner(second, groups)
    determinant = aa * bb - ab * ab
    return ((bb * at - ab * bt) / determinant).float(), ((aa * bt - ab * at) / determinant).float()

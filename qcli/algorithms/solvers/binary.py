"""Scales of one- and two-bit planes: OneBit's sign-value decomposition and DB-LLM's dual binarization."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qcli.algorithms.solvers.tables import least_squares
from qcli.core.formats.dual_binary import ALPHA1, ALPHA2, DualBinary
from qcli.core.formats.sign import IN_SCALE, OUT_SCALE, Sign
from qcli.core.weight import QuantizedWeight

SVID = Literal["power", "svd", "nmf"]
_ITERATIONS = 30  # ours: of the power iteration and of NMF; the gap of |W|'s first singular value is wide
_TURNS = 3  # ours: of the two scales of a sign weight under a full Hessian
_ROUNDS = 8  # ours: of assignment and least squares of two alphas
_SCALES = tuple(0.3 + 0.05 * step for step in range(15))  # ours: INT2 scales tried, relative to the mean magnitude
_RIDGE = 1e-6  # of small systems, relative to their diagonal
_REFIT_RIDGE = 1e-2  # of the system of all input scales, which correlate


def sign_value(weight: Tensor, importance: Tensor | None = None, kind: SVID = "power") -> dict[str, Tensor]:
    """SVID (OneBit, arXiv 2402.11295): the best `out_scale in_scale^T` for `|W|`, all entries positive.

    `|W|` is positive, so its first singular vectors are, and SVD and NMF have the same optimum.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]` (ours): of a column's error; None: all ones.
        kind: power iteration, a whole SVD, or multiplicative updates of a rank-one NMF.

    Returns:
        Tables of `formats/sign.py`.
    """
    heavy = None if importance is None else importance.clamp(min=1e-6 * float(importance.mean())).sqrt()
    size = weight.abs() if heavy is None else weight.abs() * heavy
    if kind == "svd":
        left, values, right = torch.linalg.svd(size, full_matrices=False)
        rows, columns = left[:, 0].abs() * values[0], right[0].abs()
    else:
        columns = size.mean(0)
        columns = columns / columns.norm().clamp(min=1e-30)
        rows = size @ columns
        for _ in range(_ITERATIONS):
            if kind == "power":
                columns = rows @ size
                columns = columns / columns.norm().clamp(min=1e-30)
                rows = size @ columns
            else:
                columns = columns * (rows @ size) / (rows.square().sum() * columns).clamp(min=1e-30)
                rows = rows * (size @ columns) / (rows * columns.square().sum()).clamp(min=1e-30)
    if heavy is not None:
        columns = columns / heavy
    return _sign_tables(columns, rows)


def refit_signs(target: Tensor, weight: QuantizedWeight, format: Sign, hessian: Tensor) -> QuantizedWeight:
    """Both scales by least squares under H at fixed signs, in turns (ours); the given weight where that is no better.

    Output scales have one unknown a row. Input scales are one system, `((S^T diag(h^2) S) o H) g = diag(S^T diag(h) T
    H)`, with a small ridge towards those now.

    Args:
        target: float32 `[out, in]`.
        hessian: `[in, in]`.
    """
    signs, pulled = 2 * weight.codes.float() - 1, target @ hessian
    columns, rows = weight.tables[IN_SCALE].float(), weight.tables[OUT_SCALE].float()[:, 0]

    def error(candidate: QuantizedWeight) -> float:
        difference = target - candidate.dense()
        return float((difference @ hessian * difference).sum(dtype=torch.float64))

    best = weight
    for _ in range(_TURNS):
        basis = signs * columns
        rows = (basis * pulled).sum(1) / (basis @ hessian * basis).sum(1).clamp(min=1e-30)
        scaled = signs * rows[:, None]
        normal = (scaled.T @ scaled * hessian).double()
        ridge = _REFIT_RIDGE * normal.diagonal().mean().clamp(min=1e-30)
        normal.diagonal().add_(ridge)
        right = (scaled * pulled).sum(0).double() + ridge * columns.double()
        columns = torch.linalg.solve(normal, right).float()
        candidate = QuantizedWeight(format, weight.shape, weight.codes, _sign_tables(columns, rows))
        if all(bool(table.isfinite().all()) for table in candidate.tables.values()):
            best = min(best, candidate, key=error)
    return best


def dual_binary(weight: Tensor, format: DualBinary, importance: Tensor | None = None) -> dict[str, Tensor]:
    """DB-LLM's start and ours from there: INT2 scale by search, split in two, then assignment and least squares.

    Args:
        weight: float32 `[out, in]`.
        importance: float32 `[in]`; None: all ones.

    Returns:
        Tables of `format`.
    """
    groups = format.grouped(weight)
    ones = weight.new_ones(weight.shape[1]) if importance is None else importance
    heavy = format.grouped(ones.clamp(min=1e-6 * float(ones.mean()))[None])
    size = (groups.abs() * heavy).sum(-1) / heavy.sum(-1)
    best = _BestAlphas(groups, heavy, format)
    for share in _SCALES:
        scale = 2 * share * size
        alphas = (2 * scale, -scale) if format.levels == "fdb" else (scale, scale / 2)
        best.offer(*alphas)
    for _ in range(_ROUNDS):
        first, second = format.planes(best.codes())
        best.offer(*_two_by_two(groups, heavy, first, second))
    return {ALPHA1: best.alpha1.half(), ALPHA2: best.alpha2.half()}


def refit_planes(
    target: Tensor, weight: QuantizedWeight, format: DualBinary, hessian: Tensor
) -> tuple[QuantizedWeight, int]:
    """Exact least squares of all alphas of a row under H at fixed planes; rows that gain nothing keep theirs.

    Args:
        target: float32 `[out, in]`.
        hessian: `[in, in]`.

    Returns:
        The new weight, and how many rows could not be solved for.
    """
    current = [weight.tables[name].float() for name in (ALPHA1, ALPHA2)]
    planes = list(format.planes(weight.codes))
    solved, usable = least_squares(target, planes, current, hessian, format)
    alphas = [
        table.half()
        for table in format.ordered(
            *(new.where(usable[:, None], old) for new, old in zip(solved, current, strict=True))
        )
    ]
    refitted = QuantizedWeight(format, weight.shape, weight.codes, dict(zip((ALPHA1, ALPHA2), alphas, strict=True)))

    def errors(candidate: QuantizedWeight) -> Tensor:
        difference = target - candidate.dense()
        return (difference @ hessian * difference).sum(1)

    better = (errors(refitted) < errors(weight))[:, None]
    tables = {name: refitted.tables[name].where(better, weight.tables[name]) for name in (ALPHA1, ALPHA2)}
    return QuantizedWeight(format, weight.shape, weight.codes, tables), int((~usable).sum())


class _BestAlphas:
    """The best two alphas of each group among those offered, as they will be stored: float32 `[out, groups]`."""

    def __init__(self, groups: Tensor, importance: Tensor, format: DualBinary) -> None:
        self.groups, self.importance, self.format = groups, importance, format
        self.error = groups.new_full(groups.shape[:2], torch.inf)
        self.alpha1 = self.alpha2 = groups.new_ones(groups.shape[:2])

    def codes(self) -> Tensor:
        """uint8 `[out, groups, n]`."""
        return self.format.nearest(self.groups, self.alpha1[..., None], self.alpha2[..., None]).to(torch.uint8)

    def offer(self, alpha1: Tensor, alpha2: Tensor) -> None:
        alpha1, alpha2 = (table.half().float() for table in self.format.ordered(alpha1, alpha2))
        codes = self.format.nearest(self.groups, alpha1[..., None], alpha2[..., None])
        first, second = self.format.planes(codes.to(torch.uint8))
        difference = first * alpha1[..., None] + second * alpha2[..., None] - self.groups
        error = (difference.square() * self.importance).sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.alpha1 = torch.where(better, alpha1, self.alpha1)
        self.alpha2 = torch.where(better, alpha2, self.alpha2)


def _two_by_two(groups: Tensor, importance: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The alphas that minimise the weighted error of each group at fixed planes."""

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return (left * right * importance).sum(-1).double()

    aa, ab, bb = inner(first, first), inner(first, second), inner(second, second)
    ridge = _RIDGE * (aa + bb) + 1e-30
    aa, bb = aa + ridge, bb + ridge
    at, bt = inner(first, groups), inner(second, groups)
    determinant = aa * bb - ab * ab
    return ((bb * at - ab * bt) / determinant).float(), ((aa * bt - ab * at) / determinant).float()


def _sign_tables(columns: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """Both scales in float16, shared out so that they are of one size."""
    balance = (rows.abs().mean() / columns.abs().mean().clamp(min=1e-30)).sqrt().clamp(min=1e-30)
    return {IN_SCALE: (columns * balance).half(), OUT_SCALE: (rows / balance).half()[:, None]}

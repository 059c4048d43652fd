"""Error feedback against the textbook: one column at a time, the inverse Hessian updated by elimination."""

from __future__ import annotations

import itertools

import pytest
import torch

from qcli.algorithms.solvers import codebook, feedback, grid, tables
from qcli.algorithms.solvers.target import refit
from qcli.core.formats.affine import Affine, ZeroPoint
from qcli.core.formats.codebook import Codebook
from qcli.core.weight import Format


def problem(inputs: int = 24, outputs: int = 10, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    noisy = x + 0.3 * torch.randn(tokens, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), x, noisy


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, format: Format, grid_: dict[str, torch.Tensor]
) -> torch.Tensor:
    """OBQ with a fixed order, in float64: quantize a column, spread its error by H^-1, eliminate the column."""
    rest, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.empty_like(weight, dtype=torch.uint8)
    nearest = format.rounder(grid_, torch.arange(weight.shape[1]))
    for column in range(weight.shape[1]):
        code, value = nearest(column, rest[:, column].float())
        codes[:, column] = code.to(torch.uint8)
        error = (rest[:, column] - value.double()) / inverse[column, column]
        rest -= error[:, None] * inverse[column][None]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("kind", ["affine", "codebook"])
@pytest.mark.parametrize("inputs", [24, 150])
def test_lazy_blocks_equal_the_textbook(inputs: int, kind: str) -> None:
    weight, x, _ = problem(inputs, tokens=4 * inputs)
    hessian = x.T @ x / len(x)
    hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
    format: Format
    if kind == "affine":
        format = Affine(bits=3, group_size=8, zero_point="integer")
        fixed = grid.minmax(weight, format)
    else:
        format = Codebook(bits=2, group_size=8, rank=2, table_bits=8)
        fixed = codebook.fit(weight, format)
    factor, _ = feedback.inverse_factor(hessian, 1e-12)
    assert factor is not None
    codes, _ = feedback.quantize_columns(weight, factor, torch.arange(inputs), format, fixed)
    agree = (codes == textbook(weight, hessian, format, fixed)).float().mean()
    assert float(agree) > 0.995, "float32 may differ where a value lies between two codes"


@pytest.mark.parametrize("inputs", [24, 700])
def test_factor_is_the_upper_root_of_the_inverse(inputs: int) -> None:
    _, x, _ = problem(inputs, tokens=2 * inputs)
    hessian = x.T @ x / len(x)
    factor, damping = feedback.inverse_factor(hessian, 0.01)
    assert factor is not None
    assert damping == 0.01
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(inputs)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.double().T @ factor.double() @ damped, torch.eye(inputs).double(), atol=1e-4)


def test_damping_climbs_and_gives_up_loudly() -> None:
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.02
    factor, damping = feedback.inverse_factor(indefinite, 0.01)
    assert factor is not None
    assert damping == 0.05
    hopeless = torch.eye(8)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    assert feedback.inverse_factor(hopeless, 0.01)[0] is None


def test_refit_is_the_ridge_solution() -> None:
    weight, x, noisy = problem()
    residual = torch.randn(len(x), len(weight), generator=torch.Generator().manual_seed(5))
    hessian, cross = noisy.T @ noisy / len(x), x.T @ noisy / len(x)
    residual_cross = residual.T @ noisy / len(x)
    found, used = refit(weight, hessian, cross, residual_cross, ridge=0.3)
    assert used == 0.3
    strength = 0.3 * hessian.diagonal().mean()
    # ordinary least squares on the data, with the ridge as extra rows
    rows = torch.cat([noisy, (len(x) * strength).sqrt() * torch.eye(24)])
    wanted = torch.cat([x @ weight.T + residual, (len(x) * strength).sqrt() * weight.T])
    expected = torch.linalg.lstsq(rows.double(), wanted.double()).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-3)


@pytest.mark.parametrize("zero_point", ["none", "integer", "float"])
def test_table_refit_solves_every_row(zero_point: ZeroPoint) -> None:
    weight, x, _ = problem()
    format = Affine(bits=3, group_size=8, zero_point=zero_point)
    hessian = x.T @ x / len(x)
    before = grid.minmax(weight, format)
    codes = format.encode(weight, before)
    after, usable = tables.refit_tables(weight, codes, before, format, hessian)
    assert usable.shape == (10,) and bool(usable.all())

    def loss(scales: dict[str, torch.Tensor]) -> torch.Tensor:
        difference = (format.decode(codes, scales) - weight).double()
        return ((difference @ hessian.double()) * difference).sum(1)

    assert bool((loss(after) <= loss(before) * 1.001).all())
    # nothing nearby is better: a step of any one scale by 2 % raises the loss, up to the ridge and float16
    for group in range(3):
        for step in (0.98, 1.02):
            moved = {name: table.clone() for name, table in after.items()}
            moved["weight_scale"][:, group] *= step
            if zero_point == "float":  # keep the offset where it is
                moved["weight_zero_point"][:, group] /= step
            assert float(loss(moved).sum()) > 0.999 * float(loss(after).sum())


def test_dead_inputs_get_weight_zero() -> None:
    weight, x, _ = problem()
    x[:, 3] = 0
    hessian, cleaned = feedback.without_dead_inputs(x.T @ x / len(x), weight)
    live = torch.cat([hessian.diagonal()[:3], hessian.diagonal()[4:]])
    torch.testing.assert_close(hessian[3, 3], live.mean())
    assert not cleaned[:, 3].any()
    assert torch.equal(cleaned[:, :3], weight[:, :3])


@pytest.mark.parametrize("kind", ["static", "group-aware", "none"])
def test_column_orders_are_permutations(kind: str) -> None:
    diagonal = torch.rand(20, generator=torch.Generator().manual_seed(2))
    order = feedback.column_order(torch.diag(diagonal), 8, kind)
    assert sorted(order.tolist()) == list(range(20))
    if kind == "static":
        assert bool((diagonal[order].diff() <= 0).all())
    if kind == "group-aware":
        groups = (order // 8).tolist()
        assert [groups[0], *(b for a, b in itertools.pairwise(groups) if a != b)] == list(dict.fromkeys(groups))

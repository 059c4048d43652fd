"""Uniform grids against their formulas and brute force, and the refit of their scales."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.solvers import grid
from qcli.core.formats.affine import Affine, ZeroPoint
from tests.algorithms.tensors import normal

ZERO_POINTS: tuple[ZeroPoint, ...] = ("none", "integer", "float")


def error(
    weight: torch.Tensor, format: Affine, tables: dict[str, torch.Tensor], importance: torch.Tensor
) -> torch.Tensor:
    difference = format.decode(format.encode(weight, tables), tables) - weight
    return format.grouped(difference.square() * importance).sum(-1)


def test_minmax_is_the_textbook_formula() -> None:
    weight, bits = normal(6, 32), 3
    tables = grid.minmax(weight, Affine(bits=bits, group_size=16, zero_point="integer"))
    for row in range(6):
        for group in range(2):
            values = weight[row, 16 * group : 16 * group + 16]
            low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
            scale = torch.tensor((high - low) / (2**bits - 1)).half()
            assert tables["weight_scale"][row, group] == scale
            assert tables["weight_zero_point"][row, group] == round(-low / float(scale))


def test_symmetric_grids_give_the_extra_code_to_the_side_of_larger_magnitude() -> None:
    format = Affine(bits=3, group_size=4, zero_point="none")
    weight = torch.tensor([[1.0, -0.5, 0.2, 0.1], [-1.0, 0.5, 0.2, 0.1]])
    tables = grid.minmax(weight, format)
    assert tables["weight_scale"].flatten().tolist() == [-0.25, 0.25]
    assert format.encode(weight, tables)[:, 0].tolist() == [0, 0], "the largest magnitude takes the extra code"
    assert torch.equal(format.decode(format.encode(weight, tables), tables)[:, 0], weight[:, 0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_restricted_ranges_are_zeroquants(bits: int) -> None:
    """`scale = max |w| / (2^(bits-1) - 1)`, codes within as many steps on either side; searched ones lose no more."""
    format, weight, importance = (
        Affine(bits=bits, group_size=16, zero_point="none", restricted=True),
        normal(40, 48),
        normal(48).square(),
    )
    codes, tables = grid.round_to_minmax(weight, format)
    half = 2 ** (bits - 1) - 1
    scale = (format.grouped(weight).abs().amax(-1) / half).half()
    assert torch.equal(tables["weight_scale"], scale)
    expected = (format.grouped(weight) / scale.float()[..., None]).round().clamp(-half, half) + 2 ** (bits - 1)
    assert torch.equal(codes.float(), expected.flatten(1))
    searched = grid.search(weight, format, importance)
    assert int(format.encode(weight, searched).min()) >= 1
    assert bool(
        (error(weight, format, searched, importance) <= error(weight, format, tables, importance) * (1 + 1e-5)).all()
    )


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_is_never_worse_than_minmax(bits: int, zero_point: ZeroPoint) -> None:
    format = Affine(bits=bits, group_size=16, zero_point=zero_point)
    weight, importance = normal(40, 72), normal(72, seed=1).square()
    searched = error(weight, format, grid.search(weight, format, importance), importance)
    spanning = error(weight, format, grid.minmax(weight, format), importance)
    assert bool((searched <= spanning * (1 + 1e-5)).all())
    assert float(searched.sum()) < 0.9 * float(spanning.sum())


def test_search_comes_near_brute_force() -> None:
    format = Affine(bits=2, group_size=8, zero_point="integer")
    weight, importance = normal(12, 8), torch.ones(8)
    searched = error(weight, format, grid.search(weight, format, importance), importance).flatten()
    best = torch.full((12,), torch.inf)
    for scale in torch.linspace(0.05, 2.5, 400):
        for zero_point in range(4):
            tables = {
                "weight_scale": torch.full((12, 1), float(scale)).half(),
                "weight_zero_point": torch.full((12, 1), zero_point, dtype=torch.uint8),
            }
            best = torch.minimum(best, error(weight, format, tables, importance).flatten())
    assert float(searched.sum()) < 1.15 * float(best.sum())


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_zeros_stay_zeros(zero_point: ZeroPoint) -> None:
    format = Affine(bits=3, group_size=8, zero_point=zero_point)
    for fit in (grid.minmax, grid.search):
        tables = fit(torch.zeros(3, 16), format)
        assert not format.decode(format.encode(torch.zeros(3, 16), tables), tables).any()


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 50), (7, -1), (8, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_equals_two_steps(bits: int, group_size: int, zero_point: ZeroPoint, dtype: torch.dtype) -> None:
    """Bit for bit, over several tiles, the last one smaller, and with ragged groups."""
    format = Affine(bits=bits, group_size=group_size, zero_point=zero_point)
    weight = normal(70, 9000).to(dtype)
    codes, tables = grid.round_to_minmax(weight, format)
    expected = grid.minmax(weight.float(), format)
    assert all(torch.equal(tables[name], expected[name]) for name in expected)
    assert torch.equal(codes, format.encode(weight, expected))


@pytest.mark.parametrize("zero_point", ZERO_POINTS)
def test_refit_solves_every_row(zero_point: ZeroPoint) -> None:
    format = Affine(bits=3, group_size=8, zero_point=zero_point)
    weight, x = normal(10, 24), normal(200, 24, seed=1) @ normal(24, 24, seed=2)
    hessian = x.T @ x / len(x)
    before = grid.minmax(weight, format)
    codes = format.encode(weight, before)
    after, usable = grid.refit(weight, codes, before, format, hessian)
    assert usable.shape == (10,) and bool(usable.all())

    def loss(tables: dict[str, torch.Tensor]) -> torch.Tensor:
        difference = (format.decode(codes, tables) - weight).double()
        return ((difference @ hessian.double()) * difference).sum(1)

    assert bool((loss(after) <= loss(before) * 1.001).all())
    # no neighbour is better: a step of any one scale by 2 % raises the loss, up to the ridge and float16
    for group in range(3):
        for step in (0.98, 1.02):
            moved = {name: table.clone() for name, table in after.items()}
            moved["weight_scale"][:, group] *= step
            if zero_point == "float":  # the offset stays where it is
                moved["weight_zero_point"][:, group] /= step
            assert float(loss(moved).sum()) > 0.999 * float(loss(after).sum())


def test_refit_keeps_rows_without_a_solution() -> None:
    format = Affine(bits=3, group_size=8, zero_point="integer")
    weight = normal(4, 16)
    weight[1] = 0
    before = grid.minmax(weight, format)
    after, usable = grid.refit(weight, format.encode(weight, before), before, format, torch.eye(16))
    assert usable.tolist() == [True, False, True, True]
    assert all(torch.equal(after[name][1], before[name][1]) for name in before)

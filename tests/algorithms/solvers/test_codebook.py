"""Fitting low-rank codebooks: each step and the whole against known optima."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from qcli.algorithms.solvers import codebook, grid
from qcli.algorithms.solvers.output_error import output_error
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, Codebook, TableBits
from qcli.core.weight import QuantizedWeight
from tests.algorithms.tensors import normal

SHAPE = (24, 96)


def importance(inputs: int) -> Tensor:
    return torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]


def error(weight: Tensor, tables: dict[str, Tensor], format: Codebook | Affine, weights: Tensor) -> float:
    dense = format.decode(format.encode(weight, tables), tables)
    return float(((dense - weight).square() * weights).sum())


def of_rank(rank: int, bits: int = 2, table_bits: TableBits = 16, group_size: int = 32) -> Codebook:
    return Codebook(bits=bits, group_size=group_size, rank=rank, table_bits=table_bits)


@pytest.mark.parametrize(("bits", "seed"), product((2, 3), range(4)))
def test_error_is_monotone_in_the_rank(bits: int, seed: int) -> None:
    weight, weights = 0.05 * normal(*SHAPE, seed=seed), importance(SHAPE[1])
    errors = []
    for rank in range(1, 5):
        format = of_rank(rank, bits)
        errors.append(error(weight, codebook.fit(weight, format, weights), format, weights))
    assert errors == sorted(errors, reverse=True)
    uniform = Affine(bits=bits, group_size=32, zero_point="float")
    assert errors[0] < error(weight, grid.search(weight, uniform, weights), uniform, weights)


def test_weights_with_low_rank_codebooks_are_recovered() -> None:
    """Groups that are exactly `S V - beta`, entries in one order; no uniform grid fits them."""
    format = of_rank(2)
    basis = torch.tensor([[0.0, 0.4, 0.8, 1.0], [1.0, -0.6, 0.3, 0.1]])
    scale = torch.stack([1 + 0.3 * normal(24, 3, seed=1).abs(), 0.1 * normal(24, 3, seed=2).clamp(-1, 1)], -1)
    entries = scale @ basis - 0.3
    codes = torch.arange(96).view(3, 32) % 4
    weight = entries.gather(2, codes.expand(24, 3, 32)).flatten(1)
    tables, uniform = codebook.fit(weight, format, rounds=40), Affine(bits=2, group_size=32, zero_point="float")
    fitted = error(weight, tables, format, torch.ones(96))
    assert fitted < 0.005 * float(weight.square().sum())
    assert fitted < 0.2 * error(weight, grid.search(weight, uniform), uniform, torch.ones(96))


def test_full_rank_comes_near_the_optimal_clustering() -> None:
    """Rank K - 1 with an offset gives every group free centroids; brute force over all contiguous clusters."""
    format = Codebook(bits=2, group_size=12, rank=3, table_bits=16)
    weight = normal(6, 12, seed=5)
    tables = codebook.fit(weight, format, rounds=20)
    dense = format.decode(format.encode(weight, tables), tables)
    for row, decoded in zip(weight, dense, strict=True):
        ordered = row.sort().values

        def variation(part: Tensor) -> float:
            return float((part - part.mean()).square().sum()) if len(part) else 0.0

        best = min(
            sum(variation(part) for part in ordered.tensor_split([a, b, c]))
            for a in range(13)
            for b in range(a, 13)
            for c in range(b, 13)
        )
        assert float((row - decoded).square().sum()) <= 1.35 * best + 1e-4


def test_scales_and_offsets_are_least_squares() -> None:
    basis, weights = normal(2, 4, seed=1), importance(32)
    groups, codes = (
        normal(5, 1, 32, seed=2),
        torch.randint(0, 4, (5, 1, 32), generator=torch.Generator().manual_seed(4)),
    )
    count, total = codebook._sums_by_code(groups, weights.view(1, 1, 32), codes.to(torch.uint8), 4)
    scale, offset = codebook._fit_scales(count, total, basis)
    for row in range(5):
        design = torch.cat([basis[:, codes[row, 0]], -torch.ones(1, 32)]).T * weights.sqrt()[:, None]
        solved = torch.linalg.lstsq(design, groups[row, 0] * weights.sqrt()).solution
        torch.testing.assert_close(torch.cat([scale[row, 0], offset[row]]), solved, rtol=1e-3, atol=1e-4)


def test_more_rounds_are_never_worse() -> None:
    weight, weights, format = normal(*SHAPE, seed=7), importance(SHAPE[1]), of_rank(2)
    errors = [error(weight, codebook.fit(weight, format, weights, rounds), format, weights) for rounds in (1, 2, 4, 8)]
    assert all(later <= sooner * (1 + 1e-3) for sooner, later in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("basis_rows", [0, 5])
@pytest.mark.parametrize("table_bits", [8, 16])
def test_tables_are_valid_and_8_bits_cost_little(table_bits: TableBits, basis_rows: int) -> None:
    weight, weights = 0.05 * normal(24, 90, seed=8), importance(90)
    format = Codebook(bits=3, group_size=32, rank=2, table_bits=table_bits, basis_rows=basis_rows)
    tables = codebook.fit(weight, format, weights)
    QuantizedWeight(format, (24, 90), format.encode(weight, tables), tables).check()
    full = format.model_copy(update={"table_bits": 16})
    reference = error(weight, codebook.fit(weight, full, weights), full, weights)
    assert error(weight, tables, format, weights) < 1.03 * reference


def test_degenerate_weights_are_exact() -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, :32] = 0.25, -0.5
    for bits in (2, 8):
        format = of_rank(2, bits, table_bits=16)
        tables = codebook.fit(weight, format)
        assert all(bool(table.isfinite().all()) for table in tables.values())
        assert error(weight, tables, format, torch.ones(64)) < 1e-4


@pytest.mark.parametrize("table_bits", [8, 16])
def test_refit_is_the_exact_least_squares_answer(table_bits: TableBits) -> None:
    """Under a full Hessian no small change of a scale or an offset lowers the loss."""
    target, format = 0.05 * normal(12, 64, seed=9), of_rank(2, table_bits=table_bits)
    inputs = normal(300, 64, seed=10) @ (torch.eye(64) + 0.3 * normal(64, 64, seed=11))
    hessian = inputs.T @ inputs / 300
    tables = codebook.fit(target, format, hessian.diagonal())
    before = QuantizedWeight(format, (12, 64), format.encode(target, tables), tables)
    after, unusable = codebook.refit(target, before, format, hessian)
    assert unusable == 0
    after.check()

    def loss(tables: dict[str, Tensor]) -> float:
        return output_error(target - format.decode(before.codes, tables), hessian)

    tables = format.float_tables(after.tables)
    refitted = loss(tables)
    assert refitted < loss(format.float_tables(before.tables))
    assert torch.equal(after.tables[BASIS], before.tables[BASIS])
    for name in (SCALE, OFFSET):
        moved = tables | {name: tables[name] * (1 + 0.02 * normal(*tables[name].shape, seed=12))}
        assert loss(moved) > refitted


def test_refit_is_never_worse_and_keeps_weights_it_cannot_solve_for() -> None:
    target, format = 0.05 * normal(12, 64, seed=9), of_rank(1)
    hessian = torch.eye(64)
    tables = codebook.fit(target, format)
    fitted = QuantizedWeight(format, (12, 64), format.encode(target, tables), tables)
    once, _ = codebook.refit(target, fitted, format, hessian)
    twice, _ = codebook.refit(target, once, format, hessian)
    assert float((twice.dense() - target).square().sum()) <= float((once.dense() - target).square().sum())
    kept, unusable = codebook.refit(target, once, format, torch.full((64, 64), torch.nan))
    assert unusable == 12
    assert kept is once

"""Error feedback against the textbook: one column at a time, the inverse Hessian updated by elimination."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from qcli.algorithms.solvers import cholesky, codebook, dual_binary, feedback, grid, sign_value
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.utils import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's interpreter runs kernels


def layer(inputs: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight `[10, inputs]` and the Hessian of its correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(tokens, inputs, generator=generator) @ mixing
    return torch.randn(10, inputs, generator=generator), x.T @ x / tokens


def fitted(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """Tables of a format that has a solver."""
    if isinstance(format, Affine):
        return grid.minmax(weight, format)
    if isinstance(format, Codebook):
        return codebook.fit(weight, format)
    return dual_binary.fit(weight, format) if isinstance(format, DualBinary) else sign_value.decompose(weight)


def textbook(weight: Tensor, hessian: Tensor, format: Format, tables: dict[str, Tensor]) -> Tensor:
    """OBQ in a fixed order, in float64: quantize a column, spread its error by H^-1, eliminate the column."""
    rest, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for column in range(weight.shape[1]):
        nearest = format.encode(rest.float(), tables)
        codes[:, column] = nearest[:, column]
        error = (rest - format.decode(nearest, tables).double())[:, column] / inverse[column, column]
        rest -= error[:, None] * inverse[column][None]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize(
    "format",
    [
        Affine(bits=3, group_size=8, zero_point="integer"),
        Codebook(bits=2, group_size=8, rank=2, table_bits=8),
        DualBinary(group_size=8),
        Sign(),
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", [24, 150])
def test_lazy_blocks_equal_the_textbook(inputs: int, format: Format) -> None:
    weight, hessian = layer(inputs, tokens=4 * inputs)
    hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
    tables = fitted(weight, format)
    factor, _ = feedback.inverse_factor(hessian, 1e-12)
    assert factor is not None
    codes = feedback.quantize_columns(weight, factor, torch.arange(inputs), format, [(10, tables)])
    agreement = (codes == textbook(weight, hessian, format, tables)).float().mean()
    assert float(agreement) > 0.995, "float32 may differ where a value lies between two codes"


@pytest.mark.parametrize(
    "format",
    [
        Affine(bits=3, group_size=8, zero_point="float"),
        Codebook(bits=2, group_size=8, rank=2, table_bits=8),
        DualBinary(group_size=8),
        DualBinary(group_size=8, levels="symmetric"),
        Sign(),
    ],
    ids=str,
)
def test_stacked_weights_are_quantized_as_each_alone(format: Format) -> None:
    first, hessian = layer(24, tokens=100)
    weights = [first, first.flip(0)[:7] * 2]
    factor, order = feedback.inverse_factor(hessian, 0.1)[0], hessian.diagonal().argsort()
    assert factor is not None
    parts = [(len(weight), fitted(weight, format)) for weight in weights]
    codes = feedback.quantize_columns(torch.cat(weights), factor, order, format, parts)
    alone = [
        feedback.quantize_columns(weight, factor, order, format, [part])
        for weight, part in zip(weights, parts, strict=True)
    ]
    assert torch.equal(codes, torch.cat(alone))


@pytest.mark.parametrize("inputs", [24, 150])
def test_dynamic_tables_that_do_not_change_equal_fixed_ones(inputs: int) -> None:
    """Blocks then consist of whole groups: rounding differs, and so may a value between two codes."""
    weight, hessian = layer(inputs, tokens=4 * inputs)
    format = Affine(bits=3, group_size=24, zero_point="integer")
    tables = grid.minmax(weight, format)
    factor, _ = feedback.inverse_factor(hessian, 0.01)
    assert factor is not None
    order, ends, calls = torch.arange(inputs), [*range(24, inputs, 24), inputs], []

    def fit(columns: Tensor, values: Tensor) -> dict[str, Tensor]:
        assert values.shape == (10, len(columns))
        calls.append(columns.tolist())
        return tables

    dynamic = feedback.DynamicTables(ends, fit)
    parts = [(10, tables)]
    fixed = feedback.quantize_columns(weight, factor, order, format, parts)
    codes = feedback.quantize_columns(weight, factor, order, format, parts, dynamic=dynamic)
    assert float((codes == fixed).float().mean()) > 0.995
    assert calls == [list(range(start, end)) for start, end in itertools.pairwise([0, *ends])]


@pytest.mark.parametrize("inputs", [24, 700])
def test_factor_is_the_upper_root_of_the_inverse(inputs: int) -> None:
    _, hessian = layer(inputs, tokens=2 * inputs)
    factor, damping = feedback.inverse_factor(hessian, 0.01)
    assert factor is not None
    assert damping == 0.01
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(inputs)
    assert torch.equal(factor, factor.triu())
    identity = factor.double().T @ factor.double() @ damped
    torch.testing.assert_close(identity, torch.eye(inputs).double(), rtol=0, atol=1e-4)


def test_damping_is_raised_as_far_as_it_helps() -> None:
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.02
    factor, damping = feedback.inverse_factor(indefinite, 0.01)
    assert factor is not None
    assert damping == 0.05
    hopeless = torch.eye(8)
    hopeless[0, 1] = hopeless[1, 0] = 50.0
    assert feedback.inverse_factor(hopeless, 0.01)[0] is None


def test_dead_inputs_get_weight_zero() -> None:
    weight, hessian = layer(24, tokens=200)
    hessian[3], hessian[:, 3] = 0, 0
    regular, cleaned = feedback.without_dead_inputs(hessian, weight)
    live = torch.cat([regular.diagonal()[:3], regular.diagonal()[4:]])
    torch.testing.assert_close(regular[3, 3], live.mean())
    assert not cleaned[:, 3].any()
    assert torch.equal(cleaned[:, :3], weight[:, :3])


@pytest.mark.parametrize("kind", ["static", "group-aware", "none"])
def test_column_orders_are_permutations(kind: str) -> None:
    diagonal = torch.rand(20, generator=torch.Generator().manual_seed(2))
    order = feedback.column_order(torch.diag(diagonal), 8, kind)
    assert sorted(order.tolist()) == list(range(20))
    if kind == "none":
        assert order.tolist() == list(range(20))
    if kind == "static":
        assert bool((diagonal[order].diff() <= 0).all())
    if kind == "group-aware":
        groups = (order // 8).tolist()
        assert [groups[0], *(b for a, b in itertools.pairwise(groups) if a != b)] == list(dict.fromkeys(groups))


KERNEL_FORMATS = [
    Affine(bits=3, group_size=32, zero_point="integer"),
    Affine(bits=8, group_size=32, zero_point="none", restricted=True),
    Affine(bits=2, group_size=-1, zero_point="float"),
    Codebook(bits=1, group_size=32, rank=1, table_bits=16),
    Codebook(bits=4, group_size=32, rank=2, table_bits=8),
    DualBinary(group_size=32),
    DualBinary(group_size=32, levels="symmetric"),
    Sign(),
]


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("format", KERNEL_FORMATS, ids=str)
def test_the_kernel_rounds_a_block_as_the_loop_does(format: Format, asymmetric: bool) -> None:
    """Up to the last bits of sums: where these choose another code, the row goes its own way from there."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from qcli.algorithms.solvers import feedback_kernel

    inputs, device = 40, DEVICE
    weight, hessian = layer(inputs, tokens=4 * inputs)
    factor, _ = feedback.inverse_factor(hessian, 0.1)
    assert factor is not None
    relative, columns = (factor / factor.diagonal()[:, None]).to(device), torch.arange(inputs, device=device)
    added = torch.triu(relative.sin() / 50, 1) if asymmetric else None
    tables = {name: table.to(device) for name, table in fitted(weight, format).items()}
    rounder = format.rounder(tables, columns)
    loop, kernel = (weight.T.contiguous().to(device) for _ in range(2))
    expected = feedback._round_columns(loop, relative, rounder, added)
    errors = feedback_kernel.round_columns(kernel, relative, rounder, added)
    same = (kernel - loop).abs().amax(0) < 1e-4
    assert float(same.float().mean()) == 1
    torch.testing.assert_close(errors[:, same], expected[:, same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group_size", [16, 200])
def test_kernels_serve_blocks_wider_than_one(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And find the codes of the loop, whatever ends blocks."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from qcli.algorithms.solvers import feedback_kernel

    inputs, format = 300, Affine(bits=3, group_size=group_size, zero_point="integer")
    weight, hessian = layer(inputs, tokens=2 * inputs)
    factor, _ = feedback.inverse_factor(hessian, 0.1)
    assert factor is not None
    tables, calls = grid.minmax(weight, format), list[int]()
    dynamic = feedback.DynamicTables([*range(group_size, inputs, group_size), inputs], lambda *_: tables)
    asymmetry = torch.triu(factor.sin() / 100, 1)
    tables = {name: table.to(DEVICE) for name, table in tables.items()}
    columns = torch.arange(inputs, device=DEVICE)
    arguments: Any = (weight.to(DEVICE), factor.to(DEVICE), columns, format, [(10, tables)])
    asymmetry = asymmetry.to(DEVICE)
    monkeypatch.setattr(triton_kernels, "DEVICES", set())
    loop = feedback.quantize_columns(*arguments, asymmetry=asymmetry, dynamic=dynamic)

    def counted(block: Tensor, *others: Any) -> None:
        calls.append(len(block))
        feedback_kernel._launch(block, *others)

    monkeypatch.setattr(triton_kernels, "DEVICES", {DEVICE})
    monkeypatch.setattr(torch.ops.qcli, "round_columns", counted)
    kernel = feedback.quantize_columns(*arguments, asymmetry=asymmetry, dynamic=dynamic)
    assert calls == ([16] * 18 + [12] if group_size == 16 else [128, 72, 100])
    assert float((kernel == loop).float().mean()) > 0.99


def test_bands_of_rows_change_no_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(700, 300, generator=torch.Generator().manual_seed(3))
    hessian, order = inputs.T @ inputs / 700, torch.randperm(300, generator=torch.Generator().manual_seed(4))
    whole, _ = feedback.inverse_factor(hessian, 0.01, order)
    for module in (feedback, cholesky):
        monkeypatch.setattr(module, "_BAND", 7)
    banded, _ = feedback.inverse_factor(hessian, 0.01, order)
    plain, _ = feedback.inverse_factor(hessian[order][:, order], 0.01)
    assert whole is not None and banded is not None and plain is not None
    torch.testing.assert_close(banded, whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain, banded)

"""Properties of every format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.core.weight import QuantizedWeight


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(weight: QuantizedWeight) -> QuantizedWeight:
    """Convert to stored tensors and back; check that they are those of `Format.stored`, and that nothing changes."""
    stored, expected = weight.format.to_stored(weight), weight.format.stored(weight.shape)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        name: (t.torch_dtype, t.shape) for name, t in expected.items()
    }
    again = weight.format.from_stored(stored, weight.shape)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dense(), weight.dense())
    return again


def rounder_agrees_with_encode(weight: QuantizedWeight, target: Tensor) -> None:
    """Rounding `target` column by column in any order gives `weight`, which is `target` encoded."""
    format, columns = weight.format, weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(4))
    rounder = format.rounder(weight.tables, order)
    rounded = torch.empty_like(target)
    for position, column in enumerate(order.tolist()):
        values, error = target[:, column].clone(), torch.empty(len(target))
        shifted = values if rounder.shift is None else values + rounder.shift[position]
        rounder.error(shifted, error, *(operand[position] for operand in rounder.operands))
        rounded[:, column] = values - error
    torch.testing.assert_close(rounded, weight.dense())
    assert torch.equal(format.encode(rounded, weight.tables), weight.codes)


def gradients_are_finite_differences(weight: QuantizedWeight) -> None:
    """The gradients of `decode` in every table."""
    format = weight.format
    floats = {name: table.clone().requires_grad_() for name, table in format.float_tables(weight.tables).items()}
    pull = drawn(*weight.shape, seed=9)
    (format.decode(weight.codes, floats) * pull).sum().backward()
    for name, table in floats.items():
        assert table.grad is not None
        direction = drawn(*table.shape, seed=11)
        with torch.no_grad():
            low, high = (
                (format.decode(weight.codes, floats | {name: table + step * direction}) * pull).double().sum()
                for step in (-0.5, 0.5)
            )
            slope = (table.grad * direction).sum()
        assert float(slope) == pytest.approx(float(high - low), rel=1e-3, abs=1e-3)

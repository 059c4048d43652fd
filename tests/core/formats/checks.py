"""What must hold of any format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcli.core.weight import QuantizedWeight


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored_as_announced(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight after a way through its stored tensors, which are those that its format announces."""
    stored, announced = weight.format.to_stored(weight), weight.format.stored(weight.shape)
    assert {name: (t.torch_dtype, t.shape) for name, t in announced.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in stored.items()
    }
    again = weight.format.from_stored(stored, weight.shape)
    assert torch.equal(again.codes, weight.codes)
    assert torch.equal(again.dense(), weight.dense())
    return again


def rounder_agrees_with_encode(weight: QuantizedWeight, wanted: Tensor) -> None:
    """`weight` is `wanted` encoded; its columns come out the same one by one, in any order."""
    format, columns = weight.format, weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(4))
    nearest = format.rounder(weight.tables, order)
    for position, column in enumerate(order.tolist()):
        code, value = nearest(position, wanted[:, column])
        assert torch.equal(code, weight.codes[:, column].float())
        assert torch.equal(value, weight.dense()[:, column])


def gradients_are_finite_differences(weight: QuantizedWeight) -> None:
    """Of decoding, by every table."""
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

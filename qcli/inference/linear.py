"""QuantLinear, the linear layer of packed weights in every format."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcli.core.weight import Format, QuantizedWeight

_TILE = 1 << 20  # weights decoded at a time: bounds the scratch memory of a forward pass


def linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """`x W_hat^T + bias`, decoding a tile of rows at a time: x `[..., in]` -> `[..., out]` in x's dtype.

    Args:
        weight: with stored or float tables.
    """
    format, (out_features, in_features) = weight.format, weight.shape
    tables = format.float_tables(weight.tables)
    rows = max(1, _TILE // in_features)
    parts = []
    for start in range(0, out_features, rows):
        tile = slice(start, start + rows)
        decoded = format.decode(weight.codes[tile], format.slice_rows(tables, tile)).to(x.dtype)
        parts.append(F.linear(x, decoded, None if bias is None else bias[tile].to(x.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class QuantLinear(nn.Module):
    """A linear layer whose weight stays packed; its buffers have the names, shapes and dtypes of the tensors on disk.

    A forward pass decodes a tile of rows at a time and holds no dense copy of the weight.
    """

    def __init__(self, format: Format, in_features: int, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.format, self.in_features, self.out_features = format, in_features, out_features
        for name, stored in format.stored((out_features, in_features)).items():
            self.register_buffer(name, torch.empty(stored.shape, dtype=stored.torch_dtype))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        format.attach(self)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, unpacked."""
        names = self.format.stored((self.out_features, self.in_features))
        return self.format.from_stored(
            {name: getattr(self, name) for name in names}, (self.out_features, self.in_features)
        )

    @property
    def weight(self) -> Tensor:
        """The decoded weight, float32 `[out_features, in_features]`; a new tensor at each access."""
        return self.quantized.dense()

    def forward(self, x: Tensor) -> Tensor:
        """`x W_hat^T + bias`: x `[..., in_features]` -> `[..., out_features]` in x's dtype."""
        return linear(x, self.quantized, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Follow `model.to(device)` but not `model.to(dtype)`: tables keep the precision they were stored in."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, table in before.items():
            moved = self._buffers[name]
            if table is not None and moved is not None and moved.dtype != table.dtype:
                self._buffers[name] = table.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format.spec()}"

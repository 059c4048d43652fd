"""QuantLinear, the linear layer of packed weights in every format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.row_scaled import EXPONENT, RowScaled
from qcli.core.weight import Format, QuantizedWeight, from_spec
from qcli.inference.backend import choose, warn_of_reference
from qcli.inference.backends.reference import input_gradient
from qcli.utils.errors import UnsupportedError


def packed_linear(
    x: Tensor,
    format: Format,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
    bias: Tensor | None = None,
    layer: str = "a layer",
) -> Tensor:
    """`x W_hat^T + bias` by the fastest backend, without what `Format.attach` adds.

    Args:
        x: `[..., in_features]`, float16, bfloat16 or float32.
        shape: `(out_features, in_features)`.
        tensors: by suffix, as `Format.stored` describes them, on x's device.
        bias: `[out_features]`.
        layer: named in the warning if no fast backend serves the format.

    Returns:
        `[..., out_features]` in x's dtype.
    """
    if isinstance(format, RowScaled):
        power = format.shifted(torch.ones(shape[0], device=x.device), tensors[EXPONENT])
        y = (packed_linear(x, format.base, shape, tensors, None, layer).float() * power).to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)
    if isinstance(format, LowRank):
        y = packed_linear(x, format.base, shape, tensors, bias, layer)
        return y + _low_rank_term(x, format, tensors)
    choice = choose(format, shape, x.device.type, x.dtype)
    if choice.backend.device_types is None and choice.reasons and format.rounds:  # others have nothing to decode
        warn_of_reference(layer, choice.reasons)
    return choice.backend.linear(x, format, shape, tensors, bias)


def _low_rank_term(x: Tensor, format: LowRank, tensors: Mapping[str, Tensor]) -> Tensor:
    """`(x B^T) A^T` from the stored factors, whose 8-bit entries every dtype holds exactly."""
    a, b = (tensors[f"lowrank_{which}"].to(x.dtype) for which in ("a", "b"))
    inner = F.linear(x, b)
    if format.factor_bits == 8:
        scale = tensors["lowrank_a_scale"].float() * tensors["lowrank_b_scale"].float()
        inner = (inner.float() * scale).to(x.dtype)
    return F.linear(inner, a)


class _Decoded(Tensor):
    """A decoded weight. Assigning to its `data`, as peft does to merge an adapter, would change a copy: it raises."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UnsupportedError(
            "a packed weight cannot be changed, so that no adapter can be merged into it",
            hint="`qcli pack DIR --format dense --out DENSE`, load DENSE and merge the adapter there",
        )


class QuantLinear(nn.Linear):
    """A linear layer whose weight stays packed; its buffers have the names, shapes and dtypes of the tensors on disk.

    The backend that computes it is chosen by device, dtype and format (`qcli.inference.backend`). Gradients flow to
    the input, as adapters need, and to the bias, not to the weight. A subclass of `nn.Linear`, so that peft puts
    adapters on it.

    Attributes:
        name: of the layer in its model, for messages.
        compute_dtype: of the activations that the layer expects; peft creates adapters in it.
    """

    def __init__(
        self,
        format: Format,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype = torch.float32,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of nn.Linear, which creates a dense weight
        self.format, self.in_features, self.out_features = format, in_features, out_features
        self.name, self.compute_dtype = "a layer", compute_dtype
        if tensors is None:
            stored = format.stored(self.shape)
            tensors = {name: torch.empty(like.shape, dtype=like.torch_dtype) for name, like in stored.items()}
        self._suffixes, self._spec = tuple(tensors), json.dumps(format.spec())
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        format.attach(self)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.out_features, self.in_features

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors on disk, by suffix."""
        buffers: Mapping[str, Any] = self._buffers  # `getattr` takes a microsecond for each
        return {name: buffers[name] for name in self._suffixes}

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, unpacked."""
        return self.format.from_stored(self.tensors, self.shape)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The decoded weight, float32 `[out_features, in_features]`; a new tensor at each access, whose `data` cannot
        be replaced."""
        return self.quantized.dense().as_subclass(_Decoded)

    def forward(self, x: Tensor) -> Tensor:
        """`x W_hat^T + bias`: x `[..., in_features]` -> `[..., out_features]` in x's dtype."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as `F.linear` does
            x = x.to(torch.get_autocast_dtype(x.device.type))
        needs_grad = x.requires_grad or (self.bias is not None and self.bias.requires_grad)
        if torch.compiler.is_compiling() or (needs_grad and torch.is_grad_enabled()):
            y: Tensor = _linear_op(x, [*self.tensors.values()], self.bias, self._spec, list(self.shape))
            return y
        return packed_linear(x, self.format, self.shape, self.tensors, self.bias, self.name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Follow `model.to(device)` but not `model.to(dtype)`: tables keep the precision they were stored in."""
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        with keep_tables(self, self._suffixes):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format.spec()}"


@contextmanager
def keep_tables(module: nn.Module, suffixes: Iterable[str]) -> Iterator[None]:
    """Within: stored tensors of a packed layer may be moved to another device; what converts them is undone."""
    before = {name: module.get_buffer(name) for name in suffixes}
    yield
    for name, table in before.items():
        moved = module.get_buffer(name)
        if moved.dtype != table.dtype:
            module._buffers[name] = table.to(moved.device)


@cache
def _format_of(spec: str) -> Format:
    return from_spec(json.loads(spec))


@torch.library.custom_op("qcli::linear", mutates_args=())
def _linear_op(x: Tensor, tensors: list[Tensor], bias: Tensor | None, spec: str, shape: list[int]) -> Tensor:
    """`packed_linear` as an operator: opaque to `torch.compile`, differentiable in x and bias.

    Args:
        tensors: in the order of `Format.stored`.
        spec: JSON of `Format.spec`.
    """
    format, (out_features, in_features) = _format_of(spec), shape
    named = dict(zip(format.stored((out_features, in_features)), tensors, strict=True))
    return packed_linear(x, format, (out_features, in_features), named, bias)


@_linear_op.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, spec: str, shape: list[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, _, ctx.spec, ctx.shape = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    format, (out_features, in_features) = _format_of(ctx.spec), ctx.shape
    named = dict(zip(format.stored((out_features, in_features)), ctx.saved_tensors, strict=True))
    of_x = input_gradient(gradient, format, (out_features, in_features), named) if ctx.needs_input_grad[0] else None
    of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
    return of_x, [None] * len(named), of_bias, None, None


_linear_op.register_autograd(_backward, setup_context=_keep_for_backward)

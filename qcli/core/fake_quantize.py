"""Rounding to a uniform grid and back, in few passes over the weight, with closed-form gradients.

On a GPU a Triton kernel makes one pass forward, with the same bits as torch, and one backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcli.utils import triton_kernels


def fake_quantize(
    latents: Tensor, scale: Tensor, zero_point: Tensor | float, codes: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`scale * (clamp(round(latents)) - zero_point)`, straight through the rounding.

    Args:
        latents: `[..., group]` on the scale of codes, float32; or the codes themselves, uint8, which stay.
        scale: float32 `[..., 1]`.
        zero_point: likewise, or one for all.
        codes: the lowest and the highest.
        dtype: of the result; arithmetic is float32.

    Returns:
        `[..., group]`. Gradients by the tables are those of decoding at fixed codes; by latents they are the scale,
        or 0 where a latent is more than 1 beyond the last code.
    """
    kind = _WithKernels if triton_kernels.serve(latents.device) else _FakeQuantize
    output: Tensor = kind.apply(latents, scale, zero_point, codes, dtype)  # type: ignore[no-untyped-call]
    return output


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        latents: Tensor,
        scale: Tensor,
        zero_point: Tensor | float,
        codes: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        exact = latents.is_floating_point()
        steps = latents.round().clamp_(*codes).sub_(zero_point) if exact else latents - zero_point
        context.save_for_backward(latents, scale, steps)
        context.codes = codes
        return torch.mul(steps, scale, out=torch.empty_like(steps, dtype=dtype))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        latents, scale, steps = context.saved_tensors
        (gradient,), (lowest, highest) = gradients, context.codes
        of_latents = of_scale = of_zero_point = None
        if context.needs_input_grad[1]:
            of_scale = (gradient * steps).sum(-1, keepdim=True)
        if context.needs_input_grad[2]:
            of_zero_point = gradient.sum(-1, keepdim=True, dtype=torch.float32).mul_(scale).neg_()
        if context.needs_input_grad[0]:
            of_latents = torch.ops.aten.hardtanh_backward(gradient * scale, latents, lowest - 1, highest + 1)
        return of_latents, of_scale, of_zero_point, None, None


class _WithKernels(torch.autograd.Function):
    """The same; keeps the latents alone for the backward pass."""

    @staticmethod
    def forward(
        context: Any,
        latents: Tensor,
        scale: Tensor,
        zero_point: Tensor | float,
        codes: tuple[int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        from qcli.core import fake_quantize_kernel

        tensor, center = (zero_point, 0.0) if isinstance(zero_point, Tensor) else (None, zero_point)
        context.save_for_backward(latents, scale, tensor)
        context.center, context.codes = center, codes
        value: Tensor = fake_quantize_kernel.forward(latents, scale, tensor, center, codes, dtype)
        return value

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from qcli.core import fake_quantize_kernel

        needed = context.needs_input_grad[:3]
        latents, scale, zero_point = context.saved_tensors
        found = fake_quantize_kernel.backward(
            gradients[0], latents, scale, zero_point, context.center, context.codes, needed[2]
        )
        return *(each if wanted else None for each, wanted in zip(found, needed, strict=True)), None, None

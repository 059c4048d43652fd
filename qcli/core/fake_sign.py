"""Rounding to signs with a scale for each row and column by Triton kernels, with closed-form gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcli.core import fake_sign_kernel as kernel


def fake_sign(
    latents: Tensor, units: Tensor, in_scale: Tensor, out_scale: Tensor, dtype: torch.dtype, *, smooth: bool
) -> Tensor:
    """The values nearest to `units * latents`, straight through the rounding, as `Format.fake_quantize` defines it.

    Args:
        latents, units: float32 `[out, in]`.
        in_scale, out_scale: float32 `[in]`, `[out, 1]`.
        dtype: of the result; arithmetic is float32.
        smooth: latents have the slope of OneBit's authors, not 1 within a unit of their value.

    Returns:
        `[out, in]`, differentiable in latents and scales.
    """
    output: Tensor = _FakeSign.apply(latents, units, in_scale, out_scale, dtype, smooth)  # type: ignore[no-untyped-call]
    return output


class _FakeSign(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        latents: Tensor,
        units: Tensor,
        in_scale: Tensor,
        out_scale: Tensor,
        dtype: torch.dtype,
        smooth: bool,
    ) -> Tensor:
        context.save_for_backward(latents, units, in_scale, out_scale)
        context.smooth = smooth
        value: Tensor = kernel.forward(latents, units, in_scale, out_scale, dtype)
        return value

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_latents, parts, of_out = kernel.backward(gradients[0], *context.saved_tensors, context.smooth)
        return of_latents, None, parts.sum(0), of_out, None, None

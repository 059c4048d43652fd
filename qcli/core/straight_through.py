"""Straight-through gradients: the value is quantized, the gradient reaches the latent weight behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, latent: Tensor, slope: Tensor) -> Tensor:
        context.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = context.saved_tensors
        return gradients[0], gradients[0] * slope, None


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rounded: Tensor, exact: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def through_rounding(rounded: Tensor, exact: Tensor) -> Tensor:
    """`rounded` in the forward pass; in the backward pass `exact` gets the gradient unchanged.

    Args:
        rounded: of the shape and dtype of `exact`, which it was rounded from.
    """
    output: Tensor = _Rounded.apply(rounded, exact)  # type: ignore[no-untyped-call]
    return output


def straight_through(value: Tensor, latent: Tensor, slope: Tensor) -> Tensor:
    """`value` in the forward pass; in the backward pass `value` gets the gradient and `latent` the gradient times
    `slope`.

    Args:
        value: the quantized weight; differentiable in the tables it was decoded from.
        latent: the weight that was rounded to it, of the same shape.
        slope: factor on the latent's gradient, of the same shape; a boolean mask will do.
    """
    output: Tensor = _StraightThrough.apply(value, latent, slope)  # type: ignore[no-untyped-call]
    return output

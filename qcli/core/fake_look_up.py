"""Rounding to the levels of small codebooks and back by Triton kernels, with closed-form gradients."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from qcli.core import fake_look_up_kernel as kernel

Rule = Literal["table", "fdb", "symmetric"]


def holds(group: int, entries: int) -> bool:
    """Whether the kernels take groups of so many weights, with codebooks of so many levels."""
    return group <= kernel.WIDEST and entries <= kernel.MOST_ENTRIES


def fake_look_up(latents: Tensor, units: Tensor, tables: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
    """The levels nearest to `units * latents`, straight through the rounding, as `Format.fake_quantize` defines it.

    Args:
        latents, units: float32 `[..., group]`.
        tables: float32 `[..., n]`: with the rule `table` ascending levels, with `fdb` and `symmetric` the two alphas
            of `formats.dual_binary`.
        dtype: of the result; arithmetic is float32.

    Returns:
        `[..., group]`, differentiable in latents and tables.
    """
    output: Tensor = _FakeLookUp.apply(latents, units, tables, rule, dtype)  # type: ignore[no-untyped-call]
    return output


class _FakeLookUp(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, latents: Tensor, units: Tensor, tables: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
        context.save_for_backward(latents, units, tables)
        context.rule = rule
        value: Tensor = kernel.forward(latents, units, tables, rule, dtype)
        return value

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_latents, of_tables = kernel.backward(gradients[0], *context.saved_tensors, context.rule)
        return of_latents, None, of_tables, None, None

"""Entries of small codebooks by their codes, and what belongs to a code summed up, the same at every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 1 << 25  # codes that are indices of eight bytes at a time: enough to fill a GPU
_MAX_PASSES = 16  # on a GPU; with more entries, torch sorts the codes, which takes some 70 bytes for each


def look_up(entries: Tensor, codes: Tensor) -> Tensor:
    """The entry of each code: `[..., K]` and uint8 `[..., n]` -> `[..., n]`, differentiable in `entries`."""
    found: Tensor = _LookUp.apply(entries, codes)  # type: ignore[no-untyped-call]
    return found


def sums_by_code(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Sums of the values of each code: `[..., n]` and uint8 `[..., n]` -> `[..., entries]`."""
    if values.is_cuda and entries <= _MAX_PASSES:
        return one_code_at_a_time(values, codes, entries)
    return values.new_zeros(*values.shape[:-1], entries).scatter_add(-1, codes.long(), values)


def one_code_at_a_time(values: Tensor, codes: Tensor, entries: int) -> Tensor:
    """`sums_by_code` in a pass for each code: threads of a GPU would add to few sums, in an order of their own."""
    return torch.stack([values.where(codes == code, 0).sum(-1) for code in range(entries)], dim=-1)


class _LookUp(torch.autograd.Function):
    """`gather`, which keeps codes of a byte for the backward pass in place of indices of eight."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.entries = entries.shape[-1]
        if codes.numel() <= _AT_ONCE:
            return entries.gather(-1, codes.long())
        found = torch.empty(codes.shape, dtype=entries.dtype, device=codes.device)
        rows = max(1, _AT_ONCE // codes[0].numel())
        for own, indices, result in zip(entries.split(rows), codes.split(rows), found.split(rows), strict=True):
            torch.gather(own, -1, indices.long(), out=result)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        return sums_by_code(gradients[0], codes, ctx.entries), None

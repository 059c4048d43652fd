"""Causal attention of a CPU as bf16 matrix products over tiles of queries, which skip the keys that come later.

torch's kernel for a CPU takes 1.6 to 1.9 times as long, above all backward. No more memory is kept than by that kernel:
the backward pass computes the probabilities once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_TILE = 128  # queries of every head


class CausalAttention(TorchFunctionMode):
    """Within: `F.scaled_dot_product_attention` over more than a tile of tokens, causal and without a mask of its own,
    is computed here, in bf16; anything else by torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            served = _serve(*args, **(kwargs or {}))
            if served is not None:
                return served
        return func(*args, **(kwargs or {}))


def _serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The attention of torch's arguments, bf16; None if torch has to compute it."""
    if attn_mask is not None or dropout_p or not is_causal or query.ndim != 4 or query.shape[2] <= _TILE:
        return None
    heads, key_heads = query.shape[1], key.shape[1]
    alike = query.shape[2] == key.shape[2] and len(query) == len(key) == len(value)
    if not alike or heads % key_heads or (heads != key_heads and not enable_gqa):
        return None
    scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    output: Tensor = _Attention.apply(*(each.bfloat16() for each in (scaled, key, value)))  # type: ignore[no-untyped-call]
    return output


class _Attention(torch.autograd.Function):
    """Of queries `[batch, heads, length, width]`, scaled, keys and values `[batch, key heads, length, width]`."""

    @staticmethod
    def forward(context: Any, *inputs: Tensor) -> Tensor:
        context.save_for_backward(*inputs)
        query, _, value = inputs
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        for queries, keys, values, output in zip(*inputs, result, strict=True):
            for tile in _tiles(queries):
                probabilities, _ = _probabilities(queries, keys, tile)
                found = torch.bmm(probabilities, values[:, : tile.stop])
                output[:, tile] = found.view_as(output[:, tile])
        return result

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        inputs = context.saved_tensors
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in inputs]
        for queries, keys, values, gradient, of_queries, of_keys, of_values in zip(
            *inputs, *gradients, *sums, strict=True
        ):
            for tile in _tiles(queries):
                seen = slice(tile.stop)
                probabilities, own = _probabilities(queries, keys, tile)
                of_output = gradient[:, tile].reshape(*own.shape[:2], -1)
                of_values[:, seen] += torch.bmm(probabilities.mT, of_output)
                of_probabilities = torch.bmm(of_output, values[:, seen].mT)
                of_scores = torch.ops.aten._softmax_backward_data(of_probabilities, probabilities, -1, own.dtype)
                of_queries[:, tile] = torch.bmm(of_scores, keys[:, seen]).view_as(of_queries[:, tile])
                of_keys[:, seen] += torch.bmm(of_scores.mT, own)
        return tuple(each.bfloat16() for each in sums)


def _tiles(queries: Tensor) -> Iterator[slice]:
    length = queries.shape[1]
    return (slice(start, min(start + _TILE, length)) for start in range(0, length, _TILE))


def _probabilities(queries: Tensor, keys: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Of each query of a tile for all keys up to the last of them, `[key heads, queries, keys]`, queries of all heads
    that share a key's head one below the other; and these queries, `[key heads, queries, width]`."""
    own = queries[:, tile].reshape(len(keys), -1, keys.shape[-1])
    scores = torch.bmm(own, keys[:, : tile.stop].mT)
    count = tile.stop - tile.start
    later = scores.new_full((count, count), -torch.inf).triu_(1)
    scores.view(len(keys), -1, count, tile.stop)[..., tile] += later
    return scores.softmax(-1), own

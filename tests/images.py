"""Tokens with an image among them, as the processors of tiny models make them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.quantizing import TOKENS

_BLOCK_OF_PATCHES = {"pixel_values": (1, 3, 28, 28)}  # a token for each of 2 x 2 patches
# Of those whose processors give images as pictures: the shapes of what they give.
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "llava": _BLOCK_OF_PATCHES,
    "gemma3": _BLOCK_OF_PATCHES,
    "idefics3": {"pixel_values": (1, 1, 3, 56, 56)},
    "mistral3": {"pixel_values": (1, 3, 56, 56)},
    "internvl": {"pixel_values": (1, 3, 56, 56)},
}


def with_image(model_type: str, length: int = TOKENS.shape[1]) -> dict[str, Tensor]:
    """What a processor makes of `length` tokens, at most 24, that have an image among them."""
    drawn = torch.Generator().manual_seed(5 + length)
    tokens = TOKENS[:1, :length].clone()
    if model_type in _SHAPES:
        tokens[:, 5:9] = 3
        pixels = {name: torch.randn(shape, generator=drawn) for name, shape in _SHAPES[model_type].items()}
        if model_type == "mistral3":
            pixels["image_sizes"] = torch.tensor([[56, 56]])
        types = {"token_type_ids": (tokens == 3).long()} if model_type == "gemma3" else {}
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pixels, **types}
    tokens[:, 5] = 3  # 2 x 2 patches are merged to one
    size = 3 * 2 * (14 if model_type == "qwen2_5_vl" else 16) ** 2
    grid = torch.tensor([[1, 2, 2]])
    pixels = {"pixel_values": torch.randn(4, size, generator=drawn), "image_grid_thw": grid}
    return {"input_ids": tokens, **pixels, "mm_token_type_ids": (tokens == 3).int()}

"""The model families that llama.cpp's graphs compute, one row each; nothing else in the GGUF writer knows them by name.

Facts from llama.cpp (src/models/*.cpp and conversion/, autumn 2026).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a family.

    Attributes:
        name: `general.architecture`.
        permuted: rows of q and k are stored in the order of Meta's rotary embedding.
        rope_factors: the graph divides rotary frequencies by the tensor `rope_freqs`, as Llama 3.1's scaling needs.
        activation: of the MLP, as transformers names it.
        windows: what becomes of sliding-window attention. `per layer`: the graph has it; `context`: it has not, so the
            context is limited to the window, up to which nothing differs; None: it has not, and such models are
            refused.
        soft_caps: the graph caps attention and logits, by 50 and 30 where the file says nothing.
        wide_blocks: number of blocks of the one size whose attention is scaled by the width per head in place of the
            head's size.
    """

    name: str
    permuted: bool = False
    rope_factors: bool = False
    activation: str = "silu"
    windows: Literal["per layer", "context"] | None = None
    soft_caps: bool = False
    wide_blocks: int | None = None


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True, rope_factors=True),
    "mistral": Architecture("llama", permuted=True, rope_factors=True, windows="context"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", activation=GELU),
    "gemma2": Architecture("gemma2", activation=GELU, windows="per layer", soft_caps=True, wide_blocks=46),
    "gemma3_text": Architecture("gemma3", activation=GELU, windows="per layer", wide_blocks=62),
}
"""By `model_type`."""

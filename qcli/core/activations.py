"""Simulated (fake) quantization of activations, the inputs of quantized layers.

Dynamic: each token's range comes from the token itself, so nothing is calibrated and nothing stored. Arithmetic stays
floating point: the simulation shows the quality loss, not the speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from qcli.utils.options import Options

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


_LARGEST_E4M3 = 448.0


class Activations(Options):
    """The grid that inputs of quantized layers are rounded to while the model runs.

    Token-wise dynamic quantization as in ZeroQuant-V2 (arXiv 2303.08302). Grids are those of `rtn`: the range always
    includes 0, and a symmetric grid uses all its codes, with the end of larger magnitude at the lowest one, unless its
    range is restricted as in the paper: then it has as many levels below 0 as above.
    """

    type: Literal["int", "float"] = Field(
        default="int", description="integers, or 8-bit floats (E4M3) with a scale per token, as engines compute fp8"
    )
    bits: int = Field(default=8, ge=4, le=8, description="bits of an activation's code")
    granularity: Literal["token", "block"] = Field(
        default="token", description="one range per token, or per block of a token's channels"
    )
    block_size: int = Field(default=128, ge=1, description="channels per block; the last block may be shorter")
    symmetric: bool = Field(default=False, description="no zero point; the end of larger magnitude gets the extra code")

    symmetric_range: Literal["full", "restricted"] = Field(
        default="full", description="symmetric: all codes, or without the lowest one, as in ZeroQuant-V2"
    )

    @model_validator(mode="after")
    def _restricted_is_symmetric(self) -> Self:
        if self.symmetric_range == "restricted" and not self.symmetric:
            raise ValueError("symmetric_range restricted needs symmetric: true")
        return self

    @model_validator(mode="after")
    def _floats_are_of_tokens(self) -> Self:
        if self.type == "float" and (self.bits != 8 or self.granularity != "token" or self.symmetric):
            raise ValueError("type float has 8 bits, granularity token, and no symmetric grid")
        return self

    def spec(self) -> dict[str, Any]:
        """Fields for a checkpoint's config; later ones only where they differ from what earlier versions did."""
        added = {"type": "int", "symmetric_range": "full"}
        return {key: value for key, value in self.model_dump().items() if added.get(key) != value}

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Round x to its own grids: `[..., features]`, in x's dtype, computed in float32.

        Gradients pass straight through, unclipped: a dynamic range covers every value.
        """
        import torch

        if self.type == "float":
            rounded = _to_fp8(x.detach().float()).to(x.dtype)
            return x + (rounded - x).detach() if x.requires_grad else rounded
        blocks = self._blocks(x.detach().float())
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        codes = 1 << self.bits
        if not self.symmetric:
            scale = (high - low) / (codes - 1)
        elif self.symmetric_range == "restricted":
            codes -= 1
            scale = torch.maximum(high, -low) / (codes // 2)
        else:
            scale = torch.where(high > -low, high, low) / (-codes // 2)
        scale = torch.where(scale == 0, 1.0, scale)
        least = torch.full_like(scale, -(codes // 2)) if self.symmetric else (low / scale).round()
        rounded = (blocks / scale).round().clamp(least, least + codes - 1) * scale
        rounded = rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
        return x + (rounded - x).detach() if x.requires_grad else rounded

    def simulate(self, module: nn.Module) -> RemovableHandle:
        """Fake-quantize the input of a linear module from now on; survives copying and pickling the module."""
        return module.register_forward_pre_hook(self._quantize_input, with_kwargs=True)

    def _quantize_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (x,) = (*args, *kwargs.values())
        return (self.fake_quantize(x),), {}

    def _blocks(self, x: Tensor) -> Tensor:
        """`[..., features]` -> `[..., blocks, width]`; a shorter last block is padded with zeros, which every range
        includes anyway."""
        from torch.nn import functional as F

        width = x.shape[-1] if self.granularity == "token" else min(self.block_size, x.shape[-1])
        padded = F.pad(x, (0, -x.shape[-1] % width))
        return padded.reshape(*x.shape[:-1], -1, width)


def _to_fp8(x: Tensor) -> Tensor:
    """The nearest E4M3 to each value, `[..., features]`, at a scale that covers its token's range."""
    import torch

    scale = x.abs().amax(-1, keepdim=True) / _LARGEST_E4M3
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).clamp_(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn).float() * scale

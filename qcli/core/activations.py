"""Simulated quantization of activations: the inputs of quantized layers take the values that few bits can hold.

Dynamic: every range comes from the input itself, a token at a time, so nothing is calibrated and nothing is stored.
Arithmetic stays floating point; what is measured is the loss, not the speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from qcli.utils.options import Options

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle


class Activations(Options):
    """On which grid the inputs of quantized layers are rounded while the model runs.

    Token-wise dynamic quantization as in ZeroQuant-V2 (arXiv 2303.08302); grids as in `rtn`: the range always holds 0,
    and symmetric grids use all their codes, the longer side of the range landing on the lowest.
    """

    bits: int = Field(default=8, ge=4, le=8, description="of an activation's code")
    granularity: Literal["token", "block"] = Field(
        default="token", description="one range for each token, or for each block of its channels"
    )
    block_size: int = Field(default=128, ge=1, description="channels of a block; the last one may be shorter")
    symmetric: bool = Field(default=False, description="no zero point; the longer side gets the extra code")

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest values on x's own grids: `[..., features]`, in x's dtype, computed in float32.

        Gradients pass straight through: every value is within a step of its range.
        """
        import torch

        blocks = self._blocks(x.detach().float())
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        codes = 1 << self.bits
        longer = torch.where(high > -low, high, low)
        scale = longer / (-codes // 2) if self.symmetric else (high - low) / (codes - 1)
        scale = torch.where(scale == 0, 1.0, scale)
        least = torch.full_like(scale, -codes // 2) if self.symmetric else (low / scale).round()
        rounded = (blocks / scale).round().clamp(least, least + codes - 1) * scale
        rounded = rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)
        return x + (rounded - x).detach() if x.requires_grad else rounded

    def simulate(self, module: nn.Module) -> RemovableHandle:
        """Make a linear layer see its input fake-quantized; survives copying and pickling the module."""
        return module.register_forward_pre_hook(self._quantize_input, with_kwargs=True)

    def _quantize_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (x,) = (*args, *kwargs.values())
        return (self.fake_quantize(x),), {}

    def _blocks(self, x: Tensor) -> Tensor:
        """`[..., features]` -> `[..., blocks, width]`; a ragged last block is filled up with zeros, which every range
        holds anyway."""
        from torch.nn import functional as F

        width = x.shape[-1] if self.granularity == "token" else min(self.block_size, x.shape[-1])
        padded = F.pad(x, (0, -x.shape[-1] % width))
        return padded.reshape(*x.shape[:-1], -1, width)

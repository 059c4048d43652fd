"""`fp8`: eight-bit floats with a scale for each block (DeepSeek, Qwen, MiniMax), or for the whole matrix.

The scale is named `weight_scale_inv`, yet multiplies. Experts of some checkpoints are four-bit floats, two a byte, with
exponents of two as scales; block sizes follow from the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from qcli.models.encoding import Decoded, Encoding, part
from qcli.utils.dtypes import WEIGHT_DTYPES
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FP8"]

_SCALES = "_scale_inv"
_PACKED = ("I8", "U8")


class FP8(Encoding):
    """Weights of DeepSeek's kind."""

    method: ClassVar[str] = "fp8"
    unused: ClassVar[tuple[str, ...]] = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        super().__init__(config, dtype)
        block = config.get("weight_block_size")
        if block is not None and not (
            isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
        ):
            raise self.unread(f"weight_block_size {block!r}", "two sizes, or none")
        self._block: tuple[int, int] | None = None if block is None else (block[0], block[1])

    @property
    def description(self) -> str:
        return self.method if self._block is None else f"{self.method} in blocks of {self._block[0]} x {self._block[1]}"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        for name in stored:
            if not name.endswith(_SCALES):
                continue
            weight = name.removesuffix(_SCALES)
            parts = {"weight": part(stored, weight), "scale": stored[name]}
            *stack, rows, columns = self._shape(weight, parts["weight"])
            scale = parts["scale"].stored.shape
            block = self._block_of(weight, (rows, columns), scale[-2:] if len(scale) > 1 else (1, 1))
            whole = len(scale) < 2
            decode = partial(_decode, block=block)
            yield (
                weight,
                self.weight(weight, (*stack, rows, columns), parts, decode, stack=bool(stack) and not whole),
                [weight, name],
            )

    def _shape(self, name: str, extent: Extent) -> tuple[int, ...]:
        dtype, shape = extent.stored
        if len(shape) not in (2, 3) or 0 in shape or dtype in WEIGHT_DTYPES:
            raise self.malformed(name)
        return (*shape[:-1], shape[-1] * 2) if dtype in _PACKED else shape

    def _block_of(self, name: str, shape: tuple[int, int], grid: tuple[int, ...]) -> tuple[int, int]:
        sizes = []
        for index, (size, count) in enumerate(zip(shape, grid, strict=True)):
            known = self._block[index] if self._block is not None else size
            if count and -(-size // known) == count:
                sizes.append(known)
            elif count and size % count == 0:
                sizes.append(size // count)
            else:
                raise self.malformed(name)
        return sizes[0], sizes[1]


def _decode(parts: dict[str, Tensor], block: tuple[int, int]) -> Tensor:
    import torch

    from qcli.models.encodings._numbers import dequantize, in_groups, unpack_fp4

    weight, scale = parts["weight"], parts["scale"]
    values = unpack_fp4(weight) if weight.dtype in (torch.int8, torch.uint8) else weight.float()
    groups = in_groups(values.shape[-1], block[1])
    if values.ndim == 2:
        return dequantize(values, scale.reshape(1, 1) if scale.ndim < 2 else scale, groups, height=block[0])
    grids = scale if scale.ndim == 3 else scale.reshape(-1, 1, 1).expand(len(values), 1, 1)
    for value, grid in zip(values, grids, strict=True):
        dequantize(value, grid, groups, height=block[0])
    return values

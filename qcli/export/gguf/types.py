"""GGUF's types for the weights of a layer. No torch: recipes and `--help` read this table.

Block types store 32 weights of a row with one scale (ggml-common.h, `block_q4_0` and following):

    type   bytes of 32   value          codes
    Q4_0   18            d * (q - 8)    low nibbles: weights 0..15, high nibbles: 16..31
    Q4_1   20            d * q + m      the same
    Q5_0   22            d * (q - 16)   the same, and the fifth bits in a 32-bit word
    Q5_1   24            d * q + m      the same
    Q8_0   34            d * q          signed bytes
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 32
_HALF = 2**-11  # relative rounding error of a float16, such as a block's scale


@dataclass(frozen=True)
class FloatType:
    """A type that stores every weight as a floating-point number.

    Attributes:
        name: as in gguf.GGMLQuantizationType.
        rounding: bound of the error when weights are rounded to it, relative to the tensor's largest magnitude.
    """

    name: str
    rounding: float


@dataclass(frozen=True)
class BlockType:
    """A type that stores codes and a scale for each block.

    Attributes:
        name: as in gguf.GGMLQuantizationType.
        bits: width of a code.
        offset: whether a block has a float16 offset and codes from 0; otherwise its codes are signed.
        rounding: as in `FloatType`: half a step of the grid, a whole one where the grid has one value less on one
            side, and the rounding of scale and offset.
    """

    name: str
    bits: int
    offset: bool
    rounding: float

    @property
    def bytes(self) -> int:
        """Size of one block."""
        return 2 + 2 * self.offset + BLOCK * self.bits // 8


BLOCK_TYPES = (
    BlockType("Q4_0", 4, False, 1 / 8 + _HALF),
    BlockType("Q4_1", 4, True, 1 / 15 + 3 * _HALF),
    BlockType("Q5_0", 5, False, 1 / 16 + _HALF),
    BlockType("Q5_1", 5, True, 1 / 31 + 3 * _HALF),
    BlockType("Q8_0", 8, False, 1 / 254 + _HALF),
)
FLOAT_TYPES = (FloatType("F16", _HALF), FloatType("BF16", 2**-8))
REQUANTIZE_TYPES: dict[str, BlockType | FloatType] = {type.name: type for type in (*BLOCK_TYPES, *FLOAT_TYPES)}
"""What layers can be rounded to that no block type stores exactly."""

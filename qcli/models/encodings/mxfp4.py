"""`mxfp4`: four-bit floats in blocks of 32 with an exponent of two, as GPT-OSS stores its experts.

Files have `[experts, out, blocks, 16]` bytes and `[experts, out, blocks]` exponents; the model has
`[experts, in, out]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from qcli.models.encoding import Decoded, Encoding, part
from qcli.utils.safetensors import Extent

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MXFP4"]

_BLOCKS, _SCALES = "_blocks", "_scales"


class MXFP4(Encoding):
    """GPT-OSS's stacks of experts."""

    method: ClassVar[str] = "mxfp4"

    @property
    def description(self) -> str:
        return "mxfp4 in blocks of 32"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        for name in stored:
            if not name.endswith(_BLOCKS):
                continue
            weight = name.removesuffix(_BLOCKS)
            scales = f"{weight}{_SCALES}"
            parts = {"blocks": stored[name], "scales": part(stored, scales)}
            dtype, shape = parts["blocks"].stored
            if len(shape) != 4 or dtype != "U8" or parts["scales"].stored != ("U8", shape[:-1]):
                raise self.malformed(weight)
            experts, rows, blocks, size = shape
            turned = (experts, blocks * size * 2, rows)
            yield weight, self.weight(weight, turned, parts, _decode, stack=True), [name, scales]


def _decode(parts: dict[str, Tensor]) -> Tensor:
    import torch

    from qcli.models.encodings._numbers import unpack_fp4

    values = torch.ldexp(unpack_fp4(parts["blocks"]), parts["scales"].int().unsqueeze(-1) - 127)
    return values.flatten(-2).transpose(-1, -2)

"""Uniform grid per group: `w_hat = scale * (code - zero_point)`.

Layout of compressed-tensors `pack-quantized`: codes packed along a row, integer zero points packed along
a column of groups. Symmetric has no zero point: codes are centred on `2**(bits - 1)` and a negative scale
flips the longer side of the range. A restricted range, as in ZeroQuant-V2 (arXiv 2303.08302), is symmetric without the
lowest code: as many levels below 0 as above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from qcli.core.formats._grouped import IndependentGroups
from qcli.core.formats._tables import SMALLEST_NORMAL_SCALE, not_finite, refuse
from qcli.core.weight import LARGEST_SCALE, Rounder
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["Affine"]

_MAX_OFFSET = 0.49  # of a latent from its code, where training starts: 0.5 is the boundary to the next code
# Ours: where the target lies beyond that boundary, because error feedback chose the code against the rounding of its
# own weight. Next to the boundary, the first steps would flip all such codes at once.
_OFFSET_AGAINST_ROUNDING = 0.35
ZeroPoint = Literal["none", "integer", "float"]


class Affine(IndependentGroups):
    """`bits`-bit codes on one uniform grid for every `group_size` weights of a row.

    Tables: `weight_scale` float16 `[out, groups]`; `weight_zero_point` uint8 (integer) or float16 (float)
    `[out, groups]`, absent when symmetric. The last group of a row may be shorter.
    """

    name: ClassVar[str] = "affine"

    zero_point: ZeroPoint = "integer"
    restricted: bool = False

    @model_validator(mode="after")
    def _restricted_is_symmetric(self) -> Self:
        if self.restricted and (self.zero_point != "none" or self.bits < 2):
            raise ValueError("restricted needs zero_point none and 2 bits or more")
        return self

    @property
    def lowest(self) -> int:
        """The lowest code in use."""
        return 1 if self.restricted else 0

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << self.bits) - 1

    def spec(self) -> dict[str, Any]:
        """Without `restricted` where it is false: such layers mean the same in every version."""
        spec = super().spec()
        return spec if self.restricted else {key: spec[key] for key in spec if key != "restricted"}

    @property
    def center(self) -> int:
        """The code of 0 where there is no zero point."""
        return 1 << (self.bits - 1)

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        out_features, in_features = shape
        groups = self.groups(in_features)
        tensors = {
            "weight_packed": StoredTensor("I32", (out_features, -(-in_features * self.bits // 32))),
            "weight_scale": StoredTensor("F16", (out_features, groups)),
        }
        if self.zero_point == "integer":
            words = -(-out_features * self.bits // 32)
            tensors["weight_zero_point"] = StoredTensor("I32", (words, groups))
        elif self.zero_point == "float":
            tensors["weight_zero_point"] = StoredTensor("F16", (out_features, groups))
        return tensors

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        from qcli.core import packing

        tensors = {
            "weight_packed": packing.pack_bits(weight.codes, self.bits),
            "weight_scale": weight.tables["weight_scale"].contiguous(),
        }
        if self.zero_point == "integer":
            by_group = weight.tables["weight_zero_point"].T.contiguous()
            tensors["weight_zero_point"] = packing.pack_bits(by_group, self.bits).T.contiguous()
        elif self.zero_point == "float":
            tensors["weight_zero_point"] = weight.tables["weight_zero_point"].contiguous()
        return tensors

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        out_features, in_features = shape
        tables = {"weight_scale": tensors["weight_scale"]}
        if self.zero_point == "integer":
            by_group = tensors["weight_zero_point"].T.contiguous()
            tables["weight_zero_point"] = packing.unpack_bits(by_group, self.bits, out_features).T.contiguous()
        elif self.zero_point == "float":
            tables["weight_zero_point"] = tensors["weight_zero_point"]
        codes = packing.unpack_bits(tensors["weight_packed"], self.bits, in_features)
        return QuantizedWeight(self, shape, codes, tables)

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        scale, zero_point = self._per_group(tables)
        codes = (self.grouped(weight.float()) / scale).add_(zero_point).round_().clamp_(self.lowest, self.highest)
        return codes.to(torch.uint8).view(weight.shape[0], -1)[:, : weight.shape[1]]

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        scale, zero_point = self._per_group(tables)
        weight = (self.grouped(codes).float() - zero_point) * scale
        return weight.view(codes.shape[0], -1)[:, : codes.shape[1]]

    def trained_latents(self, weight: QuantizedWeight, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """On the scale of codes (ours): a code is its latent, rounded, whatever becomes of the scale, and a latent has
        the same slope as the weight in units of its step."""
        import torch

        scale, zero_point = self._per_group(weight.tables)
        codes = self.grouped(weight.codes).float()
        offset = (self.grouped(target) / scale).add_(zero_point).sub_(codes)
        against = offset.sign() * _OFFSET_AGAINST_ROUNDING
        latents = codes + torch.where(offset.abs() > 0.5, against, offset.clamp(-_MAX_OFFSET, _MAX_OFFSET))
        return latents.view(weight.shape[0], -1)[:, : weight.shape[1]], None

    def latent_codes(self, latents: Tensor, units: Tensor | None, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        return latents.round().clamp_(self.lowest, self.highest).to(torch.uint8)

    def fake_quantize(
        self, latents: Tensor, units: Tensor | None, tables: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        return self.decode_as(latents, tables, dtype)

    def decode_as(self, codes: Tensor, tables: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Of codes, or of latents, which are rounded to codes."""
        from qcli.core.fake_quantize import fake_quantize

        scale, zero_point = self._per_group(tables)
        weight = fake_quantize(self.grouped(codes), scale, zero_point, (self.lowest, self.highest), dtype)
        return weight.view(codes.shape[0], -1)[:, : codes.shape[1]]

    def rounder(self, tables: Mapping[str, Tensor], columns: Tensor) -> Rounder:
        import torch

        groups = self.groups_of(columns)
        scale = tables["weight_scale"].T[groups].float()
        zero_point = self.center if self.zero_point == "none" else tables["weight_zero_point"].T[groups].float()

        def error(values: Tensor, result: Tensor, scale: Tensor) -> None:
            torch.div(values, scale, out=result).round_().clamp_(self.lowest, self.highest)
            torch.addcmul(values, result, scale, value=-1, out=result)

        return Rounder(error, (scale,), scale * zero_point, "grid", (self.lowest, self.highest))

    def check(self, weight: QuantizedWeight) -> None:
        problems = not_finite(weight.tables)
        problems["weight_scale holds zeros"] = (weight.tables["weight_scale"] == 0).any()
        problems[f"a code does not fit {self.bits} bits"] = weight.codes.max() > self.highest
        if self.restricted:
            problems["a code is below the restricted range"] = weight.codes.min() < self.lowest
        refuse(problems)

    @property
    def largest_weight(self) -> float:
        return LARGEST_SCALE / 2 * ((1 << self.bits) - 1)

    def imprecise_scales(self, weight: QuantizedWeight, target: Tensor) -> Tensor:
        tiny = weight.tables["weight_scale"].abs() < SMALLEST_NORMAL_SCALE
        return (tiny & self.nonzero_groups(target)).sum()

    def spread(self, table: Tensor, in_features: int) -> Tensor:
        """Repeat each entry of a table for its weights: `[out, groups]` -> `[out, in]`."""
        return table.repeat_interleave(self.group_width(in_features), dim=1)[:, :in_features]

    def _per_group(self, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        scale = tables["weight_scale"].float().unsqueeze(-1)
        if self.zero_point == "none":
            return scale, float(self.center)
        return scale, tables["weight_zero_point"].float().unsqueeze(-1)

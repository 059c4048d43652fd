"""Two binary planes with a scale each: the flexible dual binarization of DB-LLM (arXiv 2402.11960).

`fdb`: `w_hat = alpha1 b1 + alpha2 b2` with bits b and `alpha1 > -alpha2 > 0`: levels `alpha2 < 0 < alpha1 + alpha2 <
alpha1`. `symmetric` (ours): the same with signs for bits and `alpha1 > alpha2 > 0`. Code bit 0 is b1, bit 1 is b2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from qcli.core.formats._grouped import IndependentGroups, NonUniform
from qcli.core.formats._tables import SMALLEST_NORMAL_SCALE, check_tables
from qcli.core.weight import Rounder
from qcli.utils.dtypes import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.fake_look_up import Rule
    from qcli.core.weight import QuantizedWeight

__all__ = ["DualBinary"]

ALPHA1, ALPHA2 = "alpha1", "alpha2"
Levels = Literal["fdb", "symmetric"]
_MIN_RATIO = 1 + 2.0**-9  # of alpha1 to |alpha2|: two steps of float16
_SMALLEST = 2.0**-24  # the smallest positive float16: lower bound of |alpha2| and of the difference


class DualBinary(IndependentGroups, NonUniform):
    """Two bit planes, with a scale each for every `group_size` weights of a row.

    Tables: `alpha1`, `alpha2` float16 `[out, groups]`. The last group of a row may be shorter.
    """

    name: ClassVar[str] = "dual-binary"

    bits: Literal[2] = 2
    levels: Levels = "fdb"

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        out_features, in_features = shape
        alpha = StoredTensor("F16", (out_features, self.groups(in_features)))
        packed = StoredTensor("I32", (out_features, -(-in_features * 2 // 32)))
        return {"weight_packed": packed, ALPHA1: alpha, ALPHA2: alpha}

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        from qcli.core import packing

        tables = {name: weight.tables[name].contiguous() for name in (ALPHA1, ALPHA2)}
        return {"weight_packed": packing.pack_bits(weight.codes, 2), **tables}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        codes = packing.unpack_bits(tensors["weight_packed"], 2, shape[1])
        return QuantizedWeight(self, shape, codes, {name: tensors[name] for name in (ALPHA1, ALPHA2)})

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        alpha1, alpha2 = (tables[name].float().unsqueeze(-1) for name in (ALPHA1, ALPHA2))
        codes = self.nearest(self.grouped(weight.float()), alpha1, alpha2)
        return codes.to(torch.uint8).view(len(weight), -1)[:, : weight.shape[1]]

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        alpha1, alpha2 = (tables[name].float().unsqueeze(-1) for name in (ALPHA1, ALPHA2))
        first, second = self.planes(self.grouped(codes))
        weight: Tensor = first * alpha1 + second * alpha2
        return weight.view(codes.shape[0], -1)[:, : codes.shape[1]]

    def entries(self, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        alpha1, alpha2 = (tables[name].float().unsqueeze(-1) for name in (ALPHA1, ALPHA2))
        first, second = self.planes(torch.arange(4, device=alpha1.device))
        entries: Tensor = first * alpha1 + second * alpha2
        return entries

    def look_up_tables(self, tables: Mapping[str, Tensor]) -> tuple[Rule, Tensor]:
        import torch

        return self.levels, torch.stack([tables[name].float() for name in (ALPHA1, ALPHA2)], dim=-1)

    def round_tables(self, tables: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        alpha1, alpha2 = self.ordered(tables[ALPHA1], tables[ALPHA2])
        return super().round_tables({ALPHA1: alpha1, ALPHA2: alpha2}, initial)

    def ordered(self, alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest float32 alphas whose signs and order give each code a level of its own."""
        smaller = -(-alpha2).clamp(min=_SMALLEST) if self.levels == "fdb" else alpha2.clamp(min=_SMALLEST)
        return alpha1.maximum(smaller.abs() * _MIN_RATIO + _SMALLEST), smaller

    def planes(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the alphas, float32: bits, or signs with `symmetric`."""
        first, second = (codes & 1).float(), (codes >> 1).float()
        return (first, second) if self.levels == "fdb" else (2 * first - 1, 2 * second - 1)

    def rounder(self, tables: Mapping[str, Tensor], columns: Tensor) -> Rounder:
        import torch

        groups = self.groups_of(columns)
        middle, larger, smaller = self.as_signs(*(tables[name].T[groups].float() for name in (ALPHA1, ALPHA2)))

        def error(values: Tensor, result: Tensor, larger: Tensor, smaller: Tensor) -> None:
            torch.sub(values, torch.copysign(larger, values, out=result), out=result)
            result.sub_(torch.copysign(smaller, result))

        return Rounder(error, (larger, smaller), -middle, "signs")

    def as_signs(self, alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The levels as `middle +- larger +- smaller`; the alphas are in order."""
        if self.levels == "symmetric":
            return alpha1 * 0, alpha1, alpha2
        return (alpha1 + alpha2) / 2, alpha1 / 2, -alpha2 / 2

    def check(self, weight: QuantizedWeight) -> None:
        stored = self.stored(weight.shape)
        alpha1, alpha2 = (weight.tables[name].float() for name in (ALPHA1, ALPHA2))
        smaller = -alpha2 if self.levels == "fdb" else alpha2
        in_order = (alpha1 > smaller).all() & (smaller > 0).all()
        problems = {
            "the alphas of a group are out of order: its codes do not name levels in order": ~in_order,
            "a code does not fit 2 bits": weight.codes.max() > 3,
        }
        check_tables(weight.tables, {name: stored[name] for name in (ALPHA1, ALPHA2)}, problems)

    def imprecise_scales(self, weight: QuantizedWeight, target: Tensor) -> Tensor:
        larger = weight.tables[ALPHA1].float().abs().maximum(weight.tables[ALPHA2].float().abs())
        return ((larger < SMALLEST_NORMAL_SCALE) & self.nonzero_groups(target)).sum()

    def facts(self, weight: QuantizedWeight) -> dict[str, float]:
        """The share of zeros in each plane, which DB-LLM skips, and the additions per weight that remain."""
        if self.levels == "symmetric":
            return {}
        ones = [float(plane.mean()) for plane in self.planes(weight.codes)]
        return {"zeros_plane1": 1 - ones[0], "zeros_plane2": 1 - ones[1], "additions_per_weight": sum(ones)}

    def code_bits(self, values: Tensor, alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor]:
        """The two bits of the nearest levels' codes, bool; the alphas are in order."""
        return self._code_bits(values, alpha1, *_thresholds(alpha1, alpha2))

    def nearest(self, values: Tensor, alpha1: Tensor, alpha2: Tensor) -> Tensor:
        """Codes of the nearest levels, as floats; the alphas are in order."""
        first, second = self.code_bits(values, alpha1, alpha2)
        codes: Tensor = first.float() + 2 * second
        return codes

    def factor(self, bit: Tensor) -> Tensor:
        """What a bit, bool, multiplies its alpha with: itself, or its sign with `symmetric` (see `planes`)."""
        factor: Tensor = bit if self.levels == "fdb" else 2 * bit.float() - 1
        return factor

    def _code_bits(self, values: Tensor, alpha1: Tensor, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        if self.levels == "symmetric":
            first = values >= 0
            return first, (values - alpha1.where(first, -alpha1)) >= 0
        first = values >= middle
        return first, values - alpha1 * first <= half


def _thresholds(alpha1: Tensor, alpha2: Tensor) -> tuple[Tensor, Tensor]:
    """Of `fdb`: between codes with and without the first bit, and of what remains with and without the second."""
    return (alpha1 + alpha2) / 2, alpha2 / 2

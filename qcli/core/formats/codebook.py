"""A codebook for each group, low-rank over the groups of a linear: `w_hat = sum_r S[r] V[r, code] - beta`.

LCQ (arXiv 2405.20973): group i's codebook is row i of `C = S^T V - B` of rank r, `B = beta 1^T`. The uniform grid has
rank 1 and a ramp as V. No code of the paper is public; ours are a V for each block of rows, and the layout of its
double quantization: S and beta in 8-bit integers with one float16 scale for each 256 of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qcli.core.formats._grouped import NonUniform
from qcli.core.formats._tables import SMALLEST_BLOCK_SCALE, SMALLEST_NORMAL_SCALE, check_tables, symmetric_int8
from qcli.core.weight import Format, Rounder
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["Codebook"]

TableBits = Literal[8, 16]
BASIS, SCALE, OFFSET = "codebook_basis", "codebook_scale", "codebook_offset"
SCALE_BLOCK = 256  # neighbouring 8-bit entries that share a float16 scale
_TILE = 1 << 20  # weights encoded at a time


class Codebook(NonUniform):
    """`bits`-bit codes into a codebook for every `group_size` weights of a row.

    Tables: `codebook_basis` V float16 `[blocks of rows, rank, 2**bits]`; `codebook_scale` S `[out, groups, rank]` and
    `codebook_offset` beta `[out, groups]`, both float16, or int8 with `codebook_scale_scale` float16
    `[ceil(out * groups / 256), rank]` and `codebook_offset_scale` float16 `[ceil(out * groups / 256)]`, in the order
    of rows. The last group of a row may be shorter.
    """

    name: ClassVar[str] = "codebook"

    rank: int = Field(ge=1)
    table_bits: TableBits
    basis_rows: int = Field(default=0, ge=0, description="rows that share a basis; 0: all")

    def stored(self, shape: tuple[int, int]) -> dict[str, StoredTensor]:
        out_features, in_features = shape
        groups = self.groups(in_features)
        tensors = {
            "weight_packed": StoredTensor("I32", (out_features, -(-in_features * self.bits // 32))),
            BASIS: StoredTensor("F16", (self._blocks(out_features), self.rank, 1 << self.bits)),
        }
        dtype = "F16" if self.table_bits == 16 else "I8"
        tensors |= {
            SCALE: StoredTensor(dtype, (out_features, groups, self.rank)),
            OFFSET: StoredTensor(dtype, (out_features, groups)),
        }
        if self.table_bits == 8:
            blocks = -(-out_features * groups // SCALE_BLOCK)
            tensors |= {
                f"{SCALE}_scale": StoredTensor("F16", (blocks, self.rank)),
                f"{OFFSET}_scale": StoredTensor("F16", (blocks,)),
            }
        return tensors

    def to_stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        from qcli.core import packing

        tables = {name: weight.tables[name].contiguous() for name in self.stored(weight.shape) if name in weight.tables}
        return {"weight_packed": packing.pack_bits(weight.codes, self.bits), **tables}

    def from_stored(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        from qcli.core import packing
        from qcli.core.weight import QuantizedWeight

        codes = packing.unpack_bits(tensors["weight_packed"], self.bits, shape[1])
        tables = {name: tensors[name] for name in self.stored(shape) if name != "weight_packed"}
        return QuantizedWeight(self, shape, codes, tables)

    def entries(self, tables: Mapping[str, Tensor]) -> Tensor:
        """The codebook of each group, float32 `[out, groups, 2**bits]`; differentiable in float tables."""
        tables = self.float_tables(tables)
        scale, entries = tables[SCALE], -tables[OFFSET][..., None]
        basis = self.spread(tables[BASIS], len(scale))
        for direction in range(self.rank):  # a matrix product would round by shapes and precision settings
            entries = entries + scale[..., direction, None] * basis[:, direction, None]
        return entries

    def spread(self, basis: Tensor, rows: int) -> Tensor:
        """Repeat each basis for its rows: `[rows, ...]`, or `[1, ...]` if there is one; a second call does nothing."""
        if len(basis) in (1, rows):
            return basis
        return basis.repeat_interleave(self.basis_rows, dim=0)[:rows]

    def encode(self, weight: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        import torch

        floats, rows = self.float_tables(tables), max(1, _TILE // weight.shape[1])
        tiles = [slice(start, start + rows) for start in range(0, len(weight), rows)]
        parts = [
            nearest(self.grouped(weight[tile].float()), self.entries(self.slice_rows(floats, tile))) for tile in tiles
        ]
        return torch.cat(parts).view(len(weight), -1)[:, : weight.shape[1]]

    def decode(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        from qcli.core.by_code import look_up

        weight = look_up(self.entries(tables), self.grouped(codes))
        return weight.view(codes.shape[0], -1)[:, : codes.shape[1]]

    def fake_quantize(
        self, latents: Tensor, units: Tensor | None, tables: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """As for all formats; without kernels in tiles where levels are few."""
        from qcli.core.look_up_in_tiles import MOST_ENTRIES, fake_look_up_in_tiles
        from qcli.utils import triton_kernels

        if triton_kernels.serve(latents.device) or 1 << self.bits > MOST_ENTRIES:
            return super().fake_quantize(latents, units, tables, dtype)
        assert units is not None
        _, levels = self.look_up_tables(tables)
        value = fake_look_up_in_tiles(self.grouped(latents), self.grouped(units), levels, dtype)
        return value.view(latents.shape[0], -1)[:, : latents.shape[1]]

    def float_tables(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._value(name, tables) for name in (BASIS, SCALE, OFFSET)}

    def round_tables(self, tables: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.table_bits == 16:
            return super().round_tables(tables, initial)
        basis = super().round_tables(tables, {BASIS: initial[BASIS]})
        return basis | self.round_table(SCALE, tables[SCALE]) | self.round_table(OFFSET, tables[OFFSET])

    def table_units(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For scales and offset half the range of their group's codebook (LCQ's reparameterisation, as we read it); for
        a basis vector its largest magnitude."""
        entries = self.entries(tables)
        half_range = (entries.amax(-1) - entries.amin(-1)) / 2
        half_range = half_range.clamp(min=0.1 * float(half_range.mean()))
        size = tables[BASIS].abs().amax(-1, keepdim=True)
        size = size.clamp(min=1e-3 * float(size.max()))
        size_by_row = self.spread(size, len(half_range)).squeeze(-1)
        return {BASIS: size, SCALE: half_range[..., None] / size_by_row[:, None], OFFSET: half_range}

    def slice_rows(self, tables: Mapping[str, Tensor], rows: slice) -> Mapping[str, Tensor]:
        floats = self.float_tables(tables)
        basis = self.spread(floats[BASIS], len(floats[SCALE]))
        basis = basis if len(basis) == 1 else basis[rows]
        return {BASIS: basis, SCALE: floats[SCALE][rows], OFFSET: floats[OFFSET][rows]}

    def cut(self, tables: Mapping[str, Tensor], rows: slice, columns: slice) -> tuple[Format, Mapping[str, Tensor]]:
        """Where neighbours no longer share their 8-bit scales, in 16-bit tables of the rank `2 rank + 1`."""
        part = rows, self.groups_between(columns)
        format, basis = self._cut_basis(tables[BASIS], rows)
        if self.table_bits == 16:
            return format, {BASIS: basis, SCALE: tables[SCALE][part], OFFSET: tables[OFFSET][part]}
        blocks = self._scale_blocks(tables[OFFSET], part)
        if blocks is None:
            return format._in_16_bits(basis, *(self._value(name, tables)[part] for name in (SCALE, OFFSET)))
        cut = {name: tables[name][part] for name in (SCALE, OFFSET)}
        cut |= {f"{name}_scale": tables[f"{name}_scale"][blocks] for name in (SCALE, OFFSET)}
        return format, {BASIS: basis, **cut}

    def _cut_basis(self, basis: Tensor, rows: slice) -> tuple[Codebook, Tensor]:
        """The basis vectors of these rows; fewer rows share them where a block of rows is cut."""
        if not self.basis_rows:
            return self, basis
        shared = gcd(rows.start, self.basis_rows)
        repeated = basis.repeat_interleave(self.basis_rows // shared, dim=0)
        cut = repeated[rows.start // shared : -(-rows.stop // shared)]
        return self.model_copy(update={"basis_rows": shared}), cut

    @staticmethod
    def _scale_blocks(table: Tensor, part: tuple[slice, slice]) -> Tensor | None:
        """Of an 8-bit table `[out, groups]`: the block that each block of its part is in, int64; None if one is in
        several."""
        import torch

        places = torch.arange(table.numel(), device=table.device).view(table.shape)[part].flatten()
        blocks = places // SCALE_BLOCK
        first = blocks[::SCALE_BLOCK]
        return first if torch.equal(blocks, first.repeat_interleave(SCALE_BLOCK)[: len(blocks)]) else None

    def _in_16_bits(self, basis: Tensor, scale: Tensor, offset: Tensor) -> tuple[Codebook, Mapping[str, Tensor]]:
        """The same codebooks with 16-bit tables, exactly: an 8-bit entry times its scale is a multiple of the smallest
        float16 with 18 significant bits, the sum of two float16.

        Args:
            scale, offset: float32 `[out, groups, rank]` and `[out, groups]`.
        """
        import torch

        high, offset_high = scale.half(), offset.half()
        if not bool(high.isfinite().all() & offset_high.isfinite().all()):
            raise UnsupportedError("a codebook with scales above the largest float16 cannot be cut")
        low, offset_low = (scale - high.float()).half(), (offset - offset_high.float()).half()
        ones = torch.ones_like(basis[:, :1])
        format = Codebook(
            bits=self.bits,
            group_size=self.group_size,
            rank=2 * self.rank + 1,
            table_bits=16,
            basis_rows=self.basis_rows,
        )
        return format, {
            BASIS: torch.cat([basis, basis, -ones], 1),
            SCALE: torch.cat([high, low, offset_low[..., None]], -1),
            OFFSET: offset_high,
        }

    def rounder(self, tables: Mapping[str, Tensor], columns: Tensor) -> Rounder:
        import torch

        from qcli.core.look_up_in_tiles import boundaries

        groups, floats = self.groups_of(columns), self.float_tables(tables)
        own = {BASIS: floats[BASIS], SCALE: floats[SCALE][:, groups], OFFSET: floats[OFFSET][:, groups]}
        entries = self.entries(own).transpose(0, 1).sort(dim=-1).values.contiguous()

        def error(values: Tensor, result: Tensor, entries: Tensor, boundaries: Tensor) -> None:
            places = torch.searchsorted(boundaries, values[:, None])
            torch.sub(values, entries.gather(1, places)[:, 0], out=result)

        return Rounder(error, (entries, boundaries(entries)), rule="table")

    def round_table(self, name: str, values: Tensor) -> dict[str, Tensor]:
        """Quantize S `[out, groups, rank]` or beta `[out, groups]` to 8 bits: float values -> stored tables."""
        from torch.nn import functional as F

        flat = values.reshape(-1, self.rank if name == SCALE else 1)
        padded = F.pad(flat, (0, 0, 0, -len(flat) % SCALE_BLOCK)).view(-1, SCALE_BLOCK, flat.shape[1])
        codes, scale = symmetric_int8(padded, 1)
        codes = codes.view(-1, flat.shape[1])[: len(flat)].view(values.shape)
        return {name: codes, f"{name}_scale": scale.squeeze(1) if name == SCALE else scale.flatten()}

    def check(self, weight: QuantizedWeight) -> None:
        stored = self.stored(weight.shape)
        tables = {name: stored[name] for name in stored if name != "weight_packed"}
        too_large = weight.codes.max() > (1 << self.bits) - 1
        check_tables(weight.tables, tables, {f"a code does not fit {self.bits} bits": too_large})

    def imprecise_scales(self, weight: QuantizedWeight, target: Tensor) -> Tensor:
        nonzero = self.nonzero_groups(target)
        if self.table_bits == 16:
            largest, smallest = weight.tables[SCALE].float().abs().amax(-1), SMALLEST_NORMAL_SCALE
        else:
            by_block = weight.tables[f"{SCALE}_scale"].float().amax(-1)
            largest = by_block.repeat_interleave(SCALE_BLOCK)[: nonzero.numel()].view(nonzero.shape)
            smallest = SMALLEST_BLOCK_SCALE
        return ((largest < smallest) & nonzero).sum()

    def _value(self, name: str, tables: Mapping[str, Tensor]) -> Tensor:
        """A table in float32, dequantized if it is stored in 8 bits."""
        table = tables[name]
        if table.is_floating_point():
            return table.float()
        scale = tables[f"{name}_scale"].float()
        flat = table.float().view(-1, *scale.shape[1:])
        return (flat * scale.repeat_interleave(SCALE_BLOCK, dim=0)[: len(flat)]).view(table.shape)

    def _blocks(self, rows: int) -> int:
        return -(-rows // self.basis_rows) if self.basis_rows else 1


def nearest(values: Tensor, entries: Tensor) -> Tensor:
    """Codes, uint8 `[..., n]`, of the entries `[..., K]` nearest to `values` `[..., n]`."""
    return _Boundaries(entries).codes(values)


class _Boundaries:
    """Decision boundaries of codebooks; of two entries equally near the lower one is chosen.

    Args:
        entries: `[..., K]`, one codebook for each row that is encoded.
    """

    def __init__(self, entries: Tensor) -> None:
        from qcli.core.look_up_in_tiles import boundaries

        ordered, self.order = entries, None
        if bool((entries.diff(dim=-1) < 0).any()):
            ordered, self.order = entries.sort(dim=-1, stable=True)
        self.between = boundaries(ordered)

    def codes(self, values: Tensor) -> Tensor:
        """`[..., n]` -> uint8 `[..., n]`."""
        import torch

        from qcli.core.look_up_in_tiles import MOST_ENTRIES, count_boundaries

        if self.between.shape[-1] < MOST_ENTRIES:
            codes = count_boundaries(values, self.between)
        else:
            codes = torch.searchsorted(self.between, values.contiguous()).to(torch.uint8)
        return codes if self.order is None else self.order.gather(-1, codes.long()).to(torch.uint8)

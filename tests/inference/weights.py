"""Random weights in every format, for tests of the backends."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.core.formats.affine import Affine, ZeroPoint
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, Codebook
from qcli.core.formats.dual_binary import ALPHA1, ALPHA2, DualBinary
from qcli.core.formats.low_rank import LowRank
from qcli.core.formats.sign import IN_SCALE, OUT_SCALE, Sign
from qcli.core.weight import Format, QuantizedWeight

KINDS: list[tuple[int, ZeroPoint]] = [(32, "integer"), (64, "none"), (-1, "float")]
AFFINE = [
    Affine(bits=bits, group_size=group_size, zero_point=zero_point)
    for bits in range(1, 9)
    for group_size, zero_point in KINDS
]
CODEBOOKS = [
    Codebook(bits=1, group_size=32, rank=1, table_bits=16),
    Codebook(bits=2, group_size=64, rank=1, table_bits=8),
    Codebook(bits=2, group_size=32, rank=2, table_bits=16, basis_rows=16),
    Codebook(bits=3, group_size=64, rank=1, table_bits=8),
    Codebook(bits=3, group_size=32, rank=3, table_bits=8, basis_rows=32),
    Codebook(bits=4, group_size=32, rank=1, table_bits=16),
    Codebook(bits=4, group_size=-1, rank=2, table_bits=8),
    Codebook(bits=6, group_size=64, rank=1, table_bits=8),
    Codebook(bits=8, group_size=64, rank=1, table_bits=16),
]
BINARY = [DualBinary(group_size=64), DualBinary(group_size=32, levels="symmetric"), Sign()]
LOW_RANK = [
    LowRank.around(AFFINE[6], 4, 8),
    LowRank.around(CODEBOOKS[1], 4, 16),
    LowRank.around(BINARY[0], 4, 8),
]
FORMATS: list[Format] = [*AFFINE, *CODEBOOKS, *BINARY, *LOW_RANK]


def random_weight(format: Format, shape: tuple[int, int], seed: int = 0) -> QuantizedWeight:
    """A weight with random codes and tables; its values are of the order of 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return torch.rand(size, generator=generator) * (high - low) + low

    if isinstance(format, LowRank):
        base = random_weight(format.base, shape, seed)
        a, b = uniform(-0.3, 0.3, shape[0], format.rank), uniform(-0.3, 0.3, format.rank, shape[1])
        tables = dict(base.tables) | format.round_factor("a", a) | format.round_factor("b", b)
        return QuantizedWeight(format, shape, base.codes, tables)
    codes = torch.randint(0, 1 << format.bits, shape, generator=generator, dtype=torch.uint8)
    if isinstance(format, Sign):
        return QuantizedWeight(
            format,
            shape,
            codes,
            {IN_SCALE: uniform(-1, 1, shape[1]).half(), OUT_SCALE: uniform(-1, 1, shape[0], 1).half()},
        )
    groups = format.groups(shape[1])  # type: ignore[attr-defined]
    if isinstance(format, Affine):
        top = (1 << format.bits) - 1
        tables = {"weight_scale": (uniform(0.5, 1.5, shape[0], groups) / (top + 1)).half()}
        zero_point = uniform(0, top, shape[0], groups)
        if format.zero_point == "integer":
            tables["weight_zero_point"] = zero_point.round().to(torch.uint8)
        elif format.zero_point == "float":
            tables["weight_zero_point"] = zero_point.half()
        return QuantizedWeight(format, shape, codes, tables)
    if isinstance(format, DualBinary):
        second = uniform(0.1, 0.4, shape[0], groups)
        second = -second if format.levels == "fdb" else second
        return QuantizedWeight(
            format, shape, codes, {ALPHA1: uniform(0.5, 1, shape[0], groups).half(), ALPHA2: second.half()}
        )
    assert isinstance(format, Codebook)
    blocks = format.stored(shape)[BASIS].shape[0]
    basis = uniform(-1, 1, blocks, format.rank, 1 << format.bits)
    scale, offset = uniform(0.2, 1, shape[0], groups, format.rank), uniform(-0.2, 0.2, shape[0], groups)
    floats = {BASIS: basis, SCALE: scale, OFFSET: offset}
    if format.table_bits == 16:
        return QuantizedWeight(format, shape, codes, {name: table.half() for name, table in floats.items()})
    tables = format.round_table(SCALE, scale) | format.round_table(OFFSET, offset)
    return QuantizedWeight(format, shape, codes, {BASIS: basis.half(), **tables})

"""Triton kernels on NVIDIA GPUs: matrix-vector products from packed weights, and tensor cores for more rows."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import BASIS, OFFSET, SCALE, Codebook
from qcli.core.formats.dual_binary import ALPHA1, ALPHA2, DualBinary
from qcli.core.formats.sign import IN_SCALE, OUT_SCALE, Sign
from qcli.core.weight import Format
from qcli.inference.backend import Backend
from qcli.inference.cuda import tuning
from qcli.utils import triton_kernels

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Triton"]

_CHUNK = 32  # codes whose words are whole, see cuda/stored.py
MATMUL_ROWS = 64  # computed by `matmul`; above, a decoded tile and the vendor's matrix product are faster
_FEW_ROWS = 4  # faster one by one than from a decoded tile
_MAX_SPANS = 512  # of one program of `gemv`
_TILE = 1 << 26  # weights decoded at a time


class Triton(Backend):
    """Reads the tensors on disk as they are."""

    name: ClassVar[str] = "triton"
    device_types: ClassVar[frozenset[str] | None] = frozenset({"cuda"})

    def unavailable_reason(self) -> str | None:
        return triton_kernels.unavailable_reason()

    def unsupported_reason(self, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        if not isinstance(format, Affine | Codebook | DualBinary | Sign):
            return f"it has no kernel for the format {format.name}"
        if dtype not in _X:
            return f"its kernels do not take {dtype}"
        if not isinstance(format, Sign) and _group(format, shape[1]) is None:
            return f"groups of {format.group_size} are neither 8, 16 nor a multiple of 32"
        return None

    def linear(
        self, x: Tensor, format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        flat = x.reshape(-1, shape[1])
        if len(flat) == 0:
            return x.new_empty(*x.shape[:-1], shape[0])
        call = prepare(format, shape, tensors)
        with torch.cuda.device_of(x) if x.is_cuda else nullcontext():
            if len(flat) == 1:
                y = gemv(flat, call, bias)
            elif len(flat) <= MATMUL_ROWS and call.has_matmul and x.dtype != torch.float32:
                y = matmul(flat, call, bias)
            elif len(flat) <= _FEW_ROWS:
                y = torch.cat([gemv(row, call, bias) for row in flat.split(1)])
            else:
                y = decoded(flat, call, bias)
        return y.view(*x.shape[:-1], shape[0])


class Call(NamedTuple):
    """A layer's tensors, numbers and compile-time constants, as the kernels name them."""

    shape: tuple[int, int]
    in_scale: Tensor | None
    words: Tensor
    scale: Tensor
    scale_scale: Tensor
    zero: Tensor
    zero_scale: Tensor
    basis: Tensor
    groups: int
    constants: Mapping[str, Any]

    @property
    def tables(self) -> tuple[Tensor, ...]:
        return self.words, self.scale, self.scale_scale, self.zero, self.zero_scale, self.basis

    @property
    def has_matmul(self) -> bool:
        """Whether words hold whole codes, tiles stay in a group, and levels need no look-up."""
        bits, kind, group = (self.constants[name] for name in ("BITS", "KIND", "GROUP"))
        return 32 % bits == 0 and (kind != "table" or bits <= 2) and group not in (8, 16)

    @property
    def chunks(self) -> int:
        return _cdiv(self.shape[1], _CHUNK)


_X = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def prepare(format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Call:
    """What the kernels take of a layer; the tensors are those on disk."""
    words, none = tensors["weight_packed"], tensors["weight_packed"]
    constants: dict[str, Any] = {
        "BITS": format.bits,
        "ZERO": "none",
        "RANK": 1,
        "EIGHT": False,
        "BASIS_ROWS": 0,
        "EVEN": shape[1] % _CHUNK == 0,
    }
    if isinstance(format, Sign):
        constants |= {"KIND": "affine", "ZERO": "half", "GROUP": 0}
        return Call(shape, tensors[IN_SCALE], words, tensors[OUT_SCALE], none, none, none, none, 1, constants)
    assert isinstance(format, Affine | Codebook | DualBinary)
    groups = format.groups(shape[1])
    constants["GROUP"] = _group(format, shape[1])
    if isinstance(format, Affine):
        constants |= {"KIND": "affine", "ZERO": {"integer": "packed"}.get(format.zero_point, format.zero_point)}
        zero = tensors.get("weight_zero_point", none)
        return Call(shape, None, words, tensors["weight_scale"], none, zero, none, none, groups, constants)
    if isinstance(format, DualBinary):
        constants["KIND"] = "planes" if format.levels == "fdb" else "signs"
        return Call(shape, None, words, tensors[ALPHA1], none, tensors[ALPHA2], none, none, groups, constants)
    eight = format.table_bits == 8
    constants |= {"KIND": "table", "RANK": format.rank, "EIGHT": eight, "BASIS_ROWS": format.basis_rows}
    scales = (tensors[f"{name}_scale"] if eight else none for name in (SCALE, OFFSET))
    scale_scale, offset_scale = scales
    tables = (tensors[SCALE], scale_scale, tensors[OFFSET], offset_scale, tensors[BASIS])
    return Call(shape, None, words, *tables, groups, constants)


def _group(format: Affine | Codebook | DualBinary, in_features: int) -> int | None:
    """The kernels' GROUP; None: they cannot."""
    width = format.group_width(in_features)
    if width == in_features:
        return 0
    return width if width % _CHUNK == 0 or width in (8, 16) else None


def gemv(x: Tensor, call: Call, bias: Tensor | None, tuned: tuning.Gemv | None = None) -> Tensor:
    """x `[1, in]` -> `[1, out]`."""
    (out_features, in_features), constants, each = call.shape, call.constants, 8 // x.element_size()
    if in_features % each or not x.is_contiguous() or x.data_ptr() % 8:
        x = F.pad(x, (0, -in_features % each)).contiguous()
    in_scale = call.in_scale
    if in_scale is not None and (in_features % 4 or in_scale.data_ptr() % 8):
        in_scale = F.pad(in_scale, (0, -in_features % 4)).clone()
    chunks, outputs = tuned or tuning.gemv(constants["BITS"], constants["KIND"])
    while constants["GROUP"] and constants["GROUP"] % (chunks * _CHUNK) and chunks * _CHUNK % constants["GROUP"]:
        chunks //= 2
    count = _cdiv(call.chunks, chunks)
    spans = min(_MAX_SPANS, max(8, _power_of_2(count)))
    splits = _cdiv(count, spans)
    y = x.new_empty(splits, out_features, dtype=x.dtype if splits == 1 else torch.float32)
    _kernels().gemv[(_cdiv(out_features, outputs), splits)](
        x.view(torch.int64),
        x if in_scale is None else in_scale.view(torch.int64),
        *call.tables,
        y if bias is None else bias,
        y,
        out_features,
        in_features,
        call.words.shape[1],
        1,
        call.groups,
        **{**constants, "EVEN": in_features % (_CHUNK * chunks) == 0},
        X=_X[x.dtype],
        IN_SCALE=in_scale is not None,
        BIAS=bias is not None and splits == 1,
        SPAN=_CHUNK * chunks,
        BN=outputs,
        BJ=spans,
        num_warps=max(1, min(16, spans // 32)),
        enable_fp_fusion=True,  # products and sums in one instruction
    )
    if splits == 1:
        return y
    total = y.sum(0, keepdim=True)
    return (total if bias is None else total + bias).to(x.dtype)


def matmul(x: Tensor, call: Call, bias: Tensor | None, tuned: tuning.Matmul | None = None) -> Tensor:
    """x `[rows, in]`, up to `MATMUL_ROWS` -> `[rows, out]`."""
    (out_features, in_features), rows, bits = call.shape, len(x), call.constants["BITS"]
    outputs, warps, stages, programs = tuned or tuning.matmul(rows)
    tile = _tile(call)
    tiles, columns = _cdiv(in_features, tile), max(16, _power_of_2(rows))
    kernels, x = _kernels(), x.contiguous()
    arranged = x.new_empty(tiles, tile, columns)
    sums = x.new_empty(tiles, columns, dtype=torch.float32)
    kernels.arrange[(tiles,)](
        x,
        x if call.in_scale is None else call.in_scale,
        arranged,
        sums,
        rows,
        in_features,
        IN_SCALE=call.in_scale is not None,
        BITS=bits,
        TILE=tile,
        BM=columns,
    )
    blocks = _cdiv(out_features, outputs)
    splits = max(1, min(tiles, programs * _processors(x.device) // blocks))
    per_program = _cdiv(tiles, splits)
    splits = _cdiv(tiles, per_program)
    parts = x.new_empty(splits, out_features, columns, dtype=torch.float32)
    kernels.matmul[(blocks, splits)](
        arranged,
        sums,
        *call.tables,
        parts,
        out_features,
        tiles,
        call.words.shape[1],
        call.groups,
        per_program,
        **{name: value for name, value in call.constants.items() if name != "EVEN"},
        BASE=1024 if x.dtype == torch.float16 else 128 if bits < 8 else 0,
        DOT32=triton_kernels.interpreted(),
        TILE=tile,
        BN=outputs,
        BM=columns,
        num_warps=warps,
        num_stages=stages,
    )
    y = x.new_empty(rows, out_features)
    kernels.collect[(_cdiv(out_features, 64),)](
        parts, parts if bias is None else bias, y, splits, rows, out_features, BIAS=bias is not None, BN=64, BM=columns
    )
    return y


def _tile(call: Call) -> int:
    """Columns of a tile of `matmul`: a power of 2 that divides the group."""
    group = call.constants["GROUP"] or 4 * _CHUNK
    return min(4 * _CHUNK, group & -group)


def decoded(x: Tensor, call: Call, bias: Tensor | None) -> Tensor:
    """x `[rows, in]` -> `[rows, out]` by the vendor's matrix product with a decoded tile at a time."""
    (out_features, in_features), chunks = call.shape, call.chunks
    columns = _by_place(x, call).reshape(len(x), -1)
    step = min(out_features, max(64, _TILE // in_features // 64 * 64))
    tile = x.new_empty(step, _CHUNK * chunks)
    y = x.new_empty(len(x), out_features)
    for start in range(0, out_features, step):
        rows = min(step, out_features - start)
        grid = (_cdiv(rows, 4), _cdiv(chunks, 128))
        _kernels().decode[grid](
            *call.tables,
            tile,
            start,
            rows,
            out_features,
            in_features,
            chunks,
            call.words.shape[1],
            1,
            call.groups,
            **call.constants,
            BN=4,
            BJ=128,
            num_warps=4,
        )
        torch.mm(columns, tile[:rows].T, out=y[:, start : start + rows])
    return y if bias is None else y.add_(bias)


def _by_place(x: Tensor, call: Call) -> Tensor:
    """Inputs in the kernels' order of columns, times their scales: `[rows, in]` -> `[rows, 32, chunks]`, a view."""
    if call.in_scale is not None:
        x = (x.float() * call.in_scale.float()).to(x.dtype)
    return F.pad(x, (0, -x.shape[1] % _CHUNK)).view(len(x), call.chunks, _CHUNK).transpose(1, 2)


@cache
def _kernels() -> ModuleType:
    from qcli.inference.cuda import kernels

    return kernels


@cache
def _processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _cdiv(number: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-number // divisor)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()

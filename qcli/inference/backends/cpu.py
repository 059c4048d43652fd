"""Compiled kernels that compute from packed codes: up to 17 times faster than decoding, see docs/measured.md."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.inference.backend import Backend
from qcli.inference.cpu.build import library
from qcli.utils.errors import ResourceError, UnsupportedError

__all__ = ["Cpu"]

_MANY = 64  # rows of x from which decoding tiles and multiplying by torch is faster
_TILE = 1 << 20  # weights decoded at a time: bounds the scratch memory of a forward pass
_SHARED = 1 << 16  # products below which a call stays on its thread
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STORED = {"F32": 0, "F16": 1, "BF16": 2, "I8": 3}
_KINDS: dict[type[Format], int] = {Affine: 0, Codebook: 1, DualBinary: 2, Sign: 3}
_ZERO_POINTS = {"none": 0, "integer": 1, "float": 2}


class Layer(ctypes.Structure):
    """The struct of this name in kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "groups", "rank", "basis_rows")),
        *((name, ctypes.c_int32) for name in ("kind", "bits", "zero_point", "symmetric")),
        ("types", ctypes.c_int32 * 6),
    )


class Cpu(Backend):
    """kernels.cpp, compiled at first use for the processor at hand."""

    name: ClassVar[str] = "cpu"
    device_types: ClassVar[frozenset[str] | None] = frozenset({"cpu"})

    def unavailable_reason(self) -> str | None:
        found = kernels()
        return found if isinstance(found, str) else None

    def unsupported_reason(self, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> str | None:
        if type(format) not in _KINDS:
            return f"there is no kernel for {format.name}"
        if dtype not in _TYPES:
            return f"there is no kernel for inputs of {dtype}"
        return None

    def linear(
        self, x: Tensor, format: Format, shape: tuple[int, int], tensors: Mapping[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        return linear(_loaded(), x, format, shape, tensors, bias)


def linear(
    kernels: ctypes.CDLL,
    x: Tensor,
    format: Format,
    shape: tuple[int, int],
    tensors: Mapping[str, Tensor],
    bias: Tensor | None,
) -> Tensor:
    """`x W_hat^T + bias` by compiled kernels; arguments as for `Backend.linear`."""
    out_features, in_features = shape
    rows = x.numel() // in_features
    y = x.new_empty(*x.shape[:-1], out_features)
    if rows == 0:
        return y
    stored = [tensors[name].contiguous() for name in _suffixes(format, shape)]
    pointers = [tensor.data_ptr() for tensor in stored]
    pointers += [0] * (6 - len(pointers))
    layer = _layer(format, shape)
    if rows >= _MANY:
        for part, weight in _tiles(kernels, layer, pointers, shape, x.dtype):
            y[..., part] = F.linear(x, weight, None if bias is None else bias[part].to(x.dtype))
        return y
    x = x.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in _TYPES else bias.float()).contiguous()
    _check(
        kernels.qcli_linear(
            layer,
            *pointers,
            x.data_ptr(),
            _TYPES[x.dtype],
            rows,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else _TYPES[bias.dtype],
            y.data_ptr(),
            torch.get_num_threads() if rows * out_features * in_features > _SHARED else 1,
        )
    )
    return y


def _tiles(
    kernels: ctypes.CDLL, layer: Layer, pointers: list[int], shape: tuple[int, int], dtype: torch.dtype
) -> Iterable[tuple[slice, Tensor]]:
    """Rows of the decoded weight, and where they are; the next tile overwrites the last."""
    step = min(shape[0], max(1, _TILE // shape[1]))
    tile = torch.empty(step, shape[1], dtype=dtype)
    for first in range(0, shape[0], step):
        part = slice(first, min(first + step, shape[0]))
        count = part.stop - first
        threads = torch.get_num_threads()
        _check(kernels.qcli_decode(layer, *pointers, first, count, _TYPES[dtype], tile.data_ptr(), threads))
        yield part, tile[:count]


def _check(code: int) -> None:
    if code:
        raise ResourceError("out of memory")


def declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions, and torch's threads."""
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    layer = (ctypes.POINTER(Layer), *(pointer,) * 6)
    kernels.qcli_linear.argtypes = (*layer, pointer, number, size, pointer, number, pointer, number)
    kernels.qcli_decode.argtypes = (*layer, size, size, number, pointer, number)
    kernels.qcli_isa.restype = ctypes.c_char_p
    kernels.qcli_use_threads_of.argtypes = (pointer,)
    kernels.qcli_use_threads_of.restype = None
    kernels.qcli_use_threads_of(_gomp_parallel())
    return kernels


@cache
def kernels() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    try:
        return declared(library())
    except UnsupportedError as problem:
        return problem.message if problem.hint is None else f"{problem.message}: {problem.hint}"


def _loaded() -> ctypes.CDLL:
    found = kernels()
    assert not isinstance(found, str)  # `unavailable_reason`
    return found


def _gomp_parallel() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP runtime that torch uses: a second runtime's threads would compete
    with its own. None: it has another interface, and the kernels start threads themselves."""
    folder = Path(torch.__file__).parent
    names = ("lib/libgomp*", "lib/libiomp*", "lib/libomp*")
    candidates = [*(file for name in names for file in sorted(folder.glob(name))), None]
    for candidate in candidates:
        try:
            runtime = ctypes.CDLL(None if candidate is None else str(candidate))
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library of all symbols
            continue
    return None


@cache
def _suffixes(format: Format, shape: tuple[int, int]) -> tuple[str, ...]:
    return tuple(format.stored(shape))


@cache
def _layer(format: Format, shape: tuple[int, int]) -> Layer:
    rows, columns = shape
    layer = Layer(rows=rows, columns=columns, group=columns, groups=1, kind=_KINDS[type(format)], bits=format.bits)
    for place, tensor in enumerate(format.stored(shape).values()):
        layer.types[place] = _STORED.get(tensor.dtype, 0)
    if isinstance(format, Affine | Codebook | DualBinary):
        layer.group, layer.groups = format.group_width(columns), format.groups(columns)
    if isinstance(format, Affine):
        layer.zero_point = _ZERO_POINTS[format.zero_point]
    elif isinstance(format, Codebook):
        layer.rank, layer.basis_rows = format.rank, format.basis_rows
    elif isinstance(format, DualBinary):
        layer.symmetric = format.levels == "symmetric"
    return layer

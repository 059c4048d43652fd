"""Dtypes by the names that safetensors and recipes use; torch is imported only for a torch dtype."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class DType(NamedTuple):
    """Size of an element in bytes, and torch's name."""

    bytes: int
    torch: str


DTYPES = {  # keyed by safetensors' name
    "F64": DType(8, "float64"),
    "F32": DType(4, "float32"),
    "F16": DType(2, "float16"),
    "BF16": DType(2, "bfloat16"),
    "F8_E4M3": DType(1, "float8_e4m3fn"),
    "F8_E5M2": DType(1, "float8_e5m2"),
    "F8_E8M0": DType(1, "float8_e8m0fnu"),
    "I64": DType(8, "int64"),
    "I32": DType(4, "int32"),
    "I16": DType(2, "int16"),
    "I8": DType(1, "int8"),
    "U8": DType(1, "uint8"),
    "BOOL": DType(1, "bool"),
}
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")  # that can be quantized
HALF_DTYPES = ("F16", "BF16")
STORED_NAME = {f"torch.{dtype.torch}": name for name, dtype in DTYPES.items()}
"""safetensors' name, keyed by `str(tensor.dtype)`."""
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
"""torch's names of dtypes that a model can run in."""


class StoredTensor(NamedTuple):
    """Dtype (safetensors' name) and shape of a tensor on disk."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return DTYPES[self.dtype].bytes * prod(self.shape)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Consecutive indices along the first dimension."""
        return StoredTensor(self.dtype, (stop - start, *self.shape[1:]))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        return torch_dtype(self.dtype)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of safetensors' name (`BF16`) or torch's own (`bfloat16`)."""
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name].torch if name in DTYPES else name)
    return dtype

"""Tensors that no file holds as they are read: pieces of stored ones, or what a conversion makes of them.

Their dtypes and shapes are known without reading. Reading one reads no more than it is made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from qcli.utils.dtypes import StoredTensor
from qcli.utils.safetensors import Extent, read_tensors

if TYPE_CHECKING:
    from torch import Tensor


class Derived(ABC):
    """A tensor made of stored ones.

    Attributes:
        stored: dtype and shape that it is read in.
    """

    stored: StoredTensor

    @property
    def joined(self) -> tuple[tuple[str, SourceTensor], ...]:
        """The stored tensors by name, if it is no more than these, one after the other along the first dimension."""
        return ()

    @property
    @abstractmethod
    def origins(self) -> tuple[Extent, ...]:
        """The stored tensors, as far as they are read."""

    @property
    def bytes(self) -> int:
        """Its share of the stored bytes."""
        return sum(extent.bytes for extent in self.origins)

    @property
    def stored_as(self) -> str:
        """The type that files store it in."""
        return self.origins[0].stored.dtype

    @abstractmethod
    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            QcliError: as `read_tensors`.
        """

    def item(self, index: int) -> Derived | Extent:
        """One of the tensors of a stack: an index along the first dimension."""
        return _Item(self, index, StoredTensor(self.stored.dtype, self.stored.shape[1:]))


SourceTensor = Extent | Derived
"""A tensor of a model: as a file holds it, or made of such."""


def read(tensor: SourceTensor) -> Tensor:
    """Read a tensor, stored or derived, into memory of its own.

    Raises:
        QcliError: as `read_tensors`.
    """
    return tensor.read() if isinstance(tensor, Derived) else read_tensors([("", tensor)])[""]


def piece(stack: SourceTensor, index: int, rows: slice, *, transposed: bool) -> SourceTensor:
    """A matrix or vector of a stack, or some of its outputs.

    Args:
        stack: `[count, out, in]`, `[count, in, out]` or `[count, out]`.
        index: along the first dimension.
        rows: which outputs.
        transposed: whether matrices of the stack are `[in, out]`; the piece is `[out, in]` nevertheless.

    Returns:
        An extent where the file holds the piece as such: it is then read, mapped and copied as any tensor.
    """
    one = stack.item(index)
    shape = one.stored.shape[::-1] if transposed else one.stored.shape
    if not transposed and rows == slice(0, shape[0], 1):
        return one
    if isinstance(one, Extent) and not transposed and rows.step == 1:
        return one.rows(rows.start, rows.stop)
    return _Piece(one, rows, transposed, StoredTensor(one.stored.dtype, (len(range(shape[0])[rows]), *shape[1:])))


@dataclass(frozen=True)
class _Piece(Derived):
    """Some outputs of a matrix or vector, turned to `[out, in]`."""

    of: SourceTensor
    chosen: slice
    transposed: bool
    stored: StoredTensor

    @property
    def origins(self) -> tuple[Extent, ...]:
        return (self.of,) if isinstance(self.of, Extent) else self.of.origins

    @property
    def bytes(self) -> int:
        return self.of.bytes * prod(self.stored.shape) // prod(self.of.stored.shape)

    @property
    def stored_as(self) -> str:
        return self.of.stored.dtype if isinstance(self.of, Extent) else self.of.stored_as

    def read(self) -> Tensor:
        import torch

        whole = read(self.of)
        part = whole[:, self.chosen].T if self.transposed else whole[self.chosen]
        return part.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Item(Derived):
    """One tensor of a stack that has to be read as a whole."""

    of: Derived
    index: int
    stored: StoredTensor

    @property
    def origins(self) -> tuple[Extent, ...]:
        return self.of.origins

    @property
    def bytes(self) -> int:
        return self.of.bytes // self.of.stored.shape[0]

    @property
    def stored_as(self) -> str:
        return self.of.stored_as

    def read(self) -> Tensor:
        return self.of.read()[self.index].clone()

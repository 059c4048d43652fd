"""How many numbers solvers work on at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_CPU, _GPU = 1 << 18, 1 << 25  # a core's cache; enough to fill a GPU
_TOGETHER = 1 << 26  # numbers in a tensor that several are joined in
_PANEL = 256  # the least number of rows that a matrix product is fast with


def tile_size(like: Tensor) -> int:
    """Numbers in a temporary tensor on the device of `like`."""
    return tile_size_on(like.device.type)


def tile_size_on(device: str) -> int:
    """Numbers in a temporary tensor on `cpu` or `cuda`."""
    return _CPU if device == "cpu" else _GPU


def row_tiles(weight: Tensor) -> Iterator[slice]:
    """Rows of `[out, in]`, a tile at a time."""
    step = max(1, tile_size(weight) // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def panels(square: Tensor) -> Iterator[slice]:
    """Rows or columns of a symmetric matrix that are worked on together: few enough that half of it can be left out."""
    step = max(_PANEL, len(square) // 8)
    for start in range(0, len(square), step):
        yield slice(start, min(start + step, len(square)))


def together(sizes: Iterable[tuple[str, Hashable, int]]) -> Iterator[tuple[Hashable, list[str]]]:
    """Tensors of one kind that are worth joining, so that one operation does for all: small ones. Large ones fill a GPU
    on their own, and the joint tensor would only take memory.

    Args:
        sizes: of each tensor its name, its kind and its number of elements.

    Yields:
        A kind, and names of this kind in their order.
    """
    joined: list[tuple[Hashable, list[str]]] = []
    last: dict[Hashable, tuple[int, list[str]]] = {}  # of each kind
    for name, kind, size in sizes:
        so_far, names = last.get(kind, (_TOGETHER, []))
        if so_far + size > _TOGETHER:
            so_far, names = 0, []
            joined.append((kind, names))
        names.append(name)
        last[kind] = so_far + size, names
    yield from joined

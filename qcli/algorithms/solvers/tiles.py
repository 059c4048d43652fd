"""How many numbers solvers work on at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_CPU, _GPU = 1 << 18, 1 << 25  # a core's cache; enough to fill a GPU
_PANEL = 256  # the least number of rows that a matrix product is fast with


def tile_size(like: Tensor) -> int:
    """Numbers in a temporary tensor on the device of `like`."""
    return _CPU if like.device.type == "cpu" else _GPU


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

"""Sensitivity of layers to rounding, as `calibrate` measures it, as a figure; needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qcli.evaluation.layer_plot import draw

_BITS, _MAPPED = (2, 3, 4), 3
_LAYER = re.compile(r".*?\.(?P<block>\d+)\.(?P<path>.+)")


def plot_sensitivity(layers: Mapping[str, Mapping[str, Any]], model: str, kind: str) -> bytes:
    """Errors by bits, as means of each block, and those of all layers at 3 bits.

    Args:
        layers: `LayerStatistics` as mappings, by layer.
        model: its name, for the title.
        kind: one of `qcli.utils.figures.KINDS`.
    """
    members: dict[int, dict[str, Mapping[int, float]]] = {}
    for name, layer in layers.items():
        if match := _LAYER.fullmatch(name):
            members.setdefault(int(match["block"]), {})[match["path"]] = layer["sensitivity"]
    blocks = [members[number] for number in sorted(members)]
    return draw(
        f"{model}: rounding to nearest, groups of 64",
        "relative squared error of outputs,\nmean of a block's layers",
        {
            f"{bits} bits": [sum(each[bits] for each in block.values()) / len(block) for block in blocks]
            for bits in _BITS
        },
        f"error at {_MAPPED} bits",
        [{path: each[_MAPPED] for path, each in block.items()} for block in blocks],
        kind,
    )

"""Layers in a table: one row for all that differ only in the numbers of their block and expert."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qcli.cli.ui.tables import Tables
from qcli.utils.text import with_wildcards

COLUMNS = {
    "shape": "out, in",
    "method": "method",
    "bits": "bits",
    "group_size": "group",
    "rank": "rank",
    "stored_as": "stored as",
    "bits_per_weight": "bpw",
    "zeros_plane1": "zeros in plane 1",
    "zeros_plane2": "in plane 2",
    "additions_per_weight": "additions/weight",
    "error": "relative error",
    "measure": "measured on",
    "divides_tensor_parallel": "tensor parallel",
    "backend": "backend",
    "why_dense": "dense because",
}
_TO_BLOCK = re.compile(r"^.*?\.\d+\.")


def show_layers(tables: Tables, layers: Sequence[Mapping[str, Any]]) -> None:
    """A row for each kind of layer; fractions that differ within a kind are averaged.

    Args:
        layers: plain data with a `name`, and any of the keys of `COLUMNS`, some of them under `base` where one format
            wraps another; keys that no layer has are left out.
    """
    layers = [{**layer.get("base", {}), **layer} for layer in layers]
    shown = [key for key in COLUMNS if any(layer.get(key) is not None for layer in layers)]
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for layer in layers:
        values = [layer.get(key) for key in shown]
        same = ("" if isinstance(value, float) else str(value) for value in values)
        kinds.setdefault((_kind(layer["name"]), *same), []).append(layer)
    tables.table(
        ["layer", "count", *(COLUMNS[key] for key in shown)],
        [
            [
                _name(members),
                len(members),
                *(_common([member.get(key) for member in members]) for key in shown),
            ]
            for members in kinds.values()
        ],
    )


def _name(members: Sequence[Mapping[str, Any]]) -> str:
    first: str = members[0]["name"]
    return first if len(members) == 1 else _kind(first)


def _kind(name: str) -> str:
    return with_wildcards(_TO_BLOCK.sub("", name))


def _common(values: Sequence[Any]) -> Any:
    if all(isinstance(value, float) for value in values):
        return sum(values) / len(values)
    if isinstance(values[0], list):
        return ", ".join(map(str, values[0])) or "none"
    return values[0]

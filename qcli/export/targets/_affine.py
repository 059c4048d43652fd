"""What targets for uniform grids share: which layers their layouts can store, and in which format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcli.core.formats.affine import Affine
from qcli.core.weight import Format
from qcli.export.target import Packable
from qcli.models.families import Linear, fused
from qcli.utils.errors import UnsupportedError

if TYPE_CHECKING:
    from qcli.core.weight import QuantizedWeight


def affine_formats(source: Packable, layout: str) -> dict[str, Affine]:
    """The format in which a layout for uniform grids stores each quantized layer, by name.

    Raises:
        UnsupportedError: a layer of another format, with a ragged last group, or with fractional zero points.
    """
    return {layer: affine_format(source, layer, layout) for layer in source.quantized}


def affine_format(source: Packable, layer: str, layout: str) -> Affine:
    """The format of one of these layers; errors as there."""
    storage = source.quantized[layer]
    format, width = storage.format, storage.shape[1]
    if not isinstance(format, Affine):
        raise UnsupportedError(
            f"{layer} is {format.name}, {layout} stores only uniform grids", hint="pack it as qcli or dense"
        )
    if width % format.group_width(width):
        raise UnsupportedError(
            f"{layer} has {width} inputs in groups of {format.group_size}: {layout} has no shorter last group",
            hint="pack it as qcli or dense, or quantize in groups that divide",
        )
    if format.zero_point == "float" and not _integers(source.read_quantized(layer)):
        raise UnsupportedError(
            f"{layer} has floating-point zero points, {layout} stores only integers",
            hint="pack it as qcli or dense, or quantize with `zero_point: integer`",
        )
    size = -1 if format.group_size > width else format.group_size
    return Affine(bits=format.bits, group_size=size, zero_point="none" if format.zero_point == "none" else "integer")


def _integers(weight: QuantizedWeight) -> bool:
    """Whether floating-point zero points are integers in the range of the codes."""
    zero_point = weight.tables["weight_zero_point"].float()
    top = (1 << weight.format.bits) - 1
    return bool(((zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= top)).all())


def with_format(weight: QuantizedWeight, format: Affine) -> QuantizedWeight:
    """The weight in the format that `affine_formats` gives for it."""
    import torch

    from qcli.core.weight import QuantizedWeight

    tables = dict(weight.tables)
    if format.zero_point == "integer":
        tables["weight_zero_point"] = tables["weight_zero_point"].to(torch.uint8)
    return QuantizedWeight(format, weight.shape, weight.codes, tables)


def refuse_conv1d(source: Packable, layout: str) -> None:
    """Raise UnsupportedError where the layers of blocks are of a class that engines do not replace by packed ones."""
    if source.family.conv1d:
        raise UnsupportedError(
            f"{source.family.model_type} has no nn.Linear layers, the only ones that {layout} packs",
            hint="pack it as qcli or dense",
        )


def refuse_dense_parts(source: Packable, layout: str) -> None:
    """Raise UnsupportedError where a model has linear layers beside its blocks, for a layout without names of dense
    layers that all of its engines understand."""
    if source.family.dense_parts:
        raise UnsupportedError(
            f"{layout} cannot say that {source.family.dense_parts[0]} is dense",
            hint="pack it as qcli or dense",
        )


def refuse_mixed_fusions(layers: list[Linear], formats: Mapping[str, Format], layout: str) -> None:
    """Raise UnsupportedError where layers that engines fuse have different formats."""
    for first, *others in fused(layers):
        for other in others:
            one, two = formats.get(first.name), formats.get(other.name)
            if one != two:
                raise UnsupportedError(
                    f"{first.name} is {_words(one)}, {other.name} is {_words(two)}: "
                    f"engines that load {layout} fuse them into one layer",
                    hint="quantize them alike (--bits auto does with --fused), or pack it as qcli or dense",
                )


def _words(format: Format | None) -> str:
    if not isinstance(format, Affine):
        return "dense" if format is None else format.name
    groups = "rows" if format.group_size == -1 else f"groups of {format.group_size}"
    return f"{format.bits} bits {'symmetric' if format.zero_point == 'none' else 'asymmetric'} in {groups}"

"""`compressed-tensors`: integers and small floats with scales for the tensor, for rows, groups or blocks.

The config has groups of layers, each with a scheme for the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from qcli.models.encoding import Decoded, Encoding, float_dtype, part
from qcli.utils.errors import UsageError
from qcli.utils.safetensors import Extent, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressedTensors"]

_PACKED, _SCALE = ".weight_packed", ".weight_scale"
_REGEX = "re:"
_READ = "tensor, channel, group and block scales of 1 to 8-bit integers and of fp8, and four-bit floats"
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


@dataclass(frozen=True)
class _Scheme:
    """How the weights of a group of layers are stored; fields as in `config_groups`."""

    targets: tuple[str, ...]
    bits: int
    floats: bool
    strategy: str
    size: int | None
    block: tuple[int, int] | None

    def closeness(self, layer: str) -> int:
        """How closely the scheme names a layer: 3 by its name, 2 by a pattern, 1 by the class; 0: not at all."""
        if layer in self.targets:
            return 3
        patterns = (target.removeprefix(_REGEX) for target in self.targets if target.startswith(_REGEX))
        if any(re.match(pattern, layer) for pattern in patterns):
            return 2
        return int(any(target[:1].isupper() for target in self.targets))


class CompressedTensors(Encoding):
    """Layers of llm-compressor and others."""

    method: ClassVar[str] = "compressed-tensors"
    unused: ClassVar[tuple[str, ...]] = (
        *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point"),
        *(".k_scale", ".v_scale", ".q_scale"),
    )

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        super().__init__(config, dtype)
        sparsity = config.get("sparsity_config") or {}
        if sparsity.get("format", "dense") != "dense":
            raise self.unread(f"sparse weights ({sparsity['format']})", _READ)
        if (config.get("transform_config") or {}).get("config_groups"):
            raise self.unread("transforms that the model computes as it runs", _READ)
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise UsageError("quantization_config has no config_groups", hint="download the model again")
        self._schemes = [self._scheme(name, group) for name, group in groups.items()]

    @property
    def description(self) -> str:
        kinds = (f"{scheme.bits}-bit {'floats' if scheme.floats else 'integers'}" for scheme in self._schemes)
        return f"compressed-tensors, {' and '.join(dict.fromkeys(kinds))}"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        for name in stored:
            if name.endswith(_SCALE):
                layer = name.removesuffix(_SCALE)
                scheme = max(self._schemes, key=lambda scheme: scheme.closeness(layer))
                if not scheme.closeness(layer):
                    raise UsageError(f"quantization_config has no group for {layer}", hint="download the model again")
                parts, names = self._parts(layer, stored)
                shape = self._shape(layer, scheme, parts)
                if "shape" in parts:
                    del parts["shape"]
                height, width = self._block(layer, scheme, shape, parts["scale"].stored.shape)
                decode = partial(
                    _decode, bits=scheme.bits, floats=scheme.floats, columns=shape[1], height=height, width=width
                )
                dtype = float_dtype(parts["scale"], self.dtype)
                weight = f"{layer}.weight"
                yield weight, self.weight(weight, shape, parts, decode, dtype=dtype), names

    def _scheme(self, name: str, group: Any) -> _Scheme:
        try:
            weights, targets = group["weights"], tuple(map(str, group["targets"]))
            block, size = weights.get("block_structure"), weights.get("group_size")
            if isinstance(block, str):
                block = [int(part) for part in block.split("x")]
            scheme = _Scheme(
                targets,
                int(weights["num_bits"]),
                weights.get("type", "int") == "float",
                str(weights.get("strategy") or ("channel" if size is None else "group")),
                None if size is None or int(size) < 1 else int(size),
                None if block is None else (int(block[0]), int(block[1])),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise UsageError(f"quantization_config: {name} is malformed", hint="download the model again") from None
        widths = (4, 8) if scheme.floats else range(1, 9)
        if scheme.bits not in widths or scheme.strategy not in _STRATEGIES:
            kind = "floats" if scheme.floats else "integers"
            raise self.unread(f"{scheme.bits}-bit {kind} and scales by {scheme.strategy}", _READ)
        return scheme

    def _parts(self, layer: str, stored: Mapping[str, Extent]) -> tuple[dict[str, Extent], list[str]]:
        packed = f"{layer}{_PACKED}" in stored
        names = {"weight": f"{layer}{_PACKED}" if packed else f"{layer}.weight", "scale": f"{layer}{_SCALE}"}
        optional = {
            "zeros": "weight_zero_point",
            "groups": "weight_g_idx",
            "global": "weight_global_scale",
            "shape": "weight_shape",
        }
        names |= {role: full for role, end in optional.items() if (full := f"{layer}.{end}") in stored}
        return {role: part(stored, full) for role, full in names.items()}, list(names.values())

    def _shape(self, layer: str, scheme: _Scheme, parts: Mapping[str, Extent]) -> tuple[int, int]:
        dtype, shape = parts["weight"].stored
        if len(shape) != 2:
            raise self.malformed(layer)
        rows, columns = shape
        if "shape" in parts:
            raw, size = read_bytes(parts["shape"]), parts["shape"].bytes // 2
            stored = int.from_bytes(raw[:size], "little"), int.from_bytes(raw[size:], "little")
            if dtype != "I32" or stored[0] != rows or -(-stored[1] * scheme.bits // 32) != columns or not size:
                raise self.malformed(layer)
            return stored
        if dtype == "U8" and scheme.floats and scheme.bits == 4:
            return rows, 2 * columns
        if dtype not in ("I8", "F8_E4M3"):
            raise self.malformed(layer)
        return rows, columns

    def _block(self, layer: str, scheme: _Scheme, shape: tuple[int, int], scales: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale, which the shape of the scales must agree with."""
        rows, columns = shape
        match scheme.strategy:
            case "tensor":
                block = rows, columns
            case "channel":
                block = 1, columns
            case "block" if scheme.block is not None:
                block = scheme.block
            case _ if scheme.size is not None:
                block = 1, scheme.size
            case _:
                raise self.malformed(layer)
        grid = -(-rows // block[0]), -(-columns // block[1])
        if scales not in (grid, *(((), (1,)) if grid == (1, 1) else ()), *((grid[:1],) if grid[1] == 1 else ())):
            raise self.malformed(layer)
        return block


def _decode(parts: dict[str, Tensor], bits: int, floats: bool, columns: int, height: int, width: int) -> Tensor:
    import torch

    from qcli.core import packing
    from qcli.models.encodings._numbers import dequantize, exponents, in_groups, unpack_fp4

    weight = parts["weight"]
    rows, center = len(weight), 1 << (bits - 1)
    scales, zeros = exponents(parts["scale"]).view(-(-rows // height), -1), parts.get("zeros")
    if weight.dtype == torch.int32:
        values = packing.unpack_bits(weight, bits, columns).float() - center
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = packing.unpack_bits(zeros.T.contiguous(), bits, rows).T.float() - center
    else:
        values = unpack_fp4(weight) if floats and bits == 4 else weight.float()
    if "global" in parts:
        scales = scales / parts["global"].float()
    groups = parts["groups"].long() if "groups" in parts else in_groups(columns, width)
    if bool((groups == -1).all()):  # columns are in their original order
        groups = in_groups(columns, width)
    if groups.shape != (columns,) or int(groups.min()) < 0 or int(groups.max()) >= scales.shape[1]:
        raise ValueError("groups that have no scale")
    return dequantize(values, scales, groups, None if zeros is None else zeros.view(scales.shape), height=height)

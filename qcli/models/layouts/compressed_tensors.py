"""compressed-tensors, as that package writes it since 0.18: uniform grids, fp8 and nvfp4.

Codes and integer zero points of uniform grids are stored as in the native layout, and each such weight has a
`weight_shape`. Small floats are stored as such. The config has one group for each distinct scheme, which finds its
layers by regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from qcli.core.activations import Activations
from qcli.core.formats import fp8, nvfp4
from qcli.core.formats.affine import Affine
from qcli.core.formats.fp8 import FP8
from qcli.core.formats.nvfp4 import NVFP4
from qcli.models.families import Family, Linear
from qcli.models.quantized import LayerStorage, QuantizedSource, stored_tensors
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError
from qcli.utils.safetensors import Extent, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["CompressedTensorsSource"]

NAME = "compressed-tensors"
Storable: TypeAlias = Affine | FP8 | NVFP4
"""The formats of layers that it stores; affine without floating-point zero points."""

_FORMATS: dict[type, str] = {Affine: "pack-quantized", FP8: "float-quantized", NVFP4: "nvfp4-pack-quantized"}
_MIXED = "mixed-precision"
_FP8_INPUTS = {
    **{"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    "group_size": None,
}


def tensors(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors on disk, by full name.

    Args:
        weight: in one of the formats of `Storable`.
    """
    import torch

    tables = weight.tables
    match weight.format:
        case FP8():
            values = weight.codes.contiguous().view(torch.float8_e4m3fn)
            return {f"{layer}.weight": values, f"{layer}.weight_scale": tables[fp8.SCALE]}
        case NVFP4():
            codes = weight.codes
            return {
                f"{layer}.weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
                f"{layer}.weight_scale": tables[nvfp4.SCALE].contiguous().view(torch.float8_e4m3fn),
                f"{layer}.weight_global_scale": tables[nvfp4.DIVISOR],
            }
    return stored_tensors(layer, weight) | {f"{layer}.weight_shape": torch.tensor(weight.shape)}


def quantization_config(
    layers: Sequence[Linear],
    family: Family,
    formats: Mapping[str, Storable | None],
    *,
    fp8_inputs: bool = False,
) -> dict[str, Any]:
    """The checkpoint's `quantization_config`.

    Args:
        layers: all quantizable layers of the model.
        formats: by layer name; None: dense.
        fp8_inputs: whether engines round the inputs of quantized layers to fp8, too.
    """
    schemes: dict[Storable | None, list[Linear]] = {}
    for layer in layers:
        schemes.setdefault(formats[layer.name], []).append(layer)
    dense = schemes.pop(None, [])
    count = 1 + max(layer.block for layer in layers)
    groups = {
        f"group_{number}": {
            "targets": _patterns(members, family, count),
            "weights": _arguments(format),
            "input_activations": _FP8_INPUTS if fp8_inputs else None,
            "output_activations": None,
            "format": _FORMATS[type(format)],
        }
        for number, (format, members) in enumerate(schemes.items())
        if format is not None
    }
    kinds = {group["format"] for group in groups.values()}
    config = {
        "quant_method": NAME,
        "format": kinds.pop() if len(kinds) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(layer.name for layer in dense)],
    }
    if family.dense_parts:  # an engine names modules of such a model in its own way, and refuses what nothing matches
        outside = [rf"re:.*{part.rpartition('.')[2]}\..*" for part in family.dense_parts]
        config["ignore"] = [r"re:.*lm_head$", *outside, *_patterns(dense, family, count)]
    decoded = {format for format in schemes if format is not None}
    # Where transformers cannot read it, the flag would make it decode wrongly; without the flag it refuses.
    decode = _transformers_decodes(decoded, family) and transformers_reads(decoded, family)
    return config | {"dequantize": True} if decode else config


def transformers_reads(formats: Iterable[Storable], family: Family) -> bool:
    """Whether transformers 5.23 can load a checkpoint with layers of these formats.

    Where it decodes layers at load time, it applies the first group's scheme to all of them.
    """
    distinct = set(formats)
    return len(distinct) == 1 or not _transformers_decodes(distinct, family)


def _transformers_decodes(formats: Collection[Storable], family: Family) -> bool:
    """Whether transformers has to decode layers at load time: it keeps those packed that are nn.Linear itself, and
    have no zero points; nvfp4 it can keep in models of bfloat16 alone."""
    return family.own_linear or any(
        isinstance(each, NVFP4) or (isinstance(each, Affine) and each.zero_point != "none") for each in formats
    )


class CompressedTensorsSource(QuantizedSource):
    """A folder that `qcli pack` wrote in this layout."""

    def _storage_config(self, config: dict[str, Any]) -> _StorageConfig:
        return _StorageConfig(config, self.extents)


class _AffineLayer(LayerStorage):
    """An affine layer with its `weight_shape`."""

    def stored(self, layer: str) -> dict[str, StoredTensor]:
        return super().stored(layer) | {f"{layer}.weight_shape": StoredTensor("I64", (2,))}


class _FP8Layer(LayerStorage):
    """A layer whose weight is one of small floats."""

    def stored(self, layer: str) -> dict[str, StoredTensor]:
        return {
            f"{layer}.weight": StoredTensor("F8_E4M3", self.shape),
            f"{layer}.weight_scale": StoredTensor("BF16", (self.shape[0], 1)),
        }

    def restore(self, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        import torch

        from qcli.core.weight import QuantizedWeight

        codes, tables = tensors[f"{layer}.weight"].view(torch.uint8), {fp8.SCALE: tensors[f"{layer}.weight_scale"]}
        return QuantizedWeight(self.format, self.shape, codes, tables)


class _NVFP4Layer(LayerStorage):
    """Two four-bit floats a byte, the lower half first."""

    def stored(self, layer: str) -> dict[str, StoredTensor]:
        rows, columns = self.shape
        return {
            f"{layer}.weight_packed": StoredTensor("U8", (rows, columns // 2)),
            f"{layer}.weight_scale": StoredTensor("F8_E4M3", (rows, columns // nvfp4.BLOCK)),
            f"{layer}.weight_global_scale": StoredTensor("F32", (1,)),
        }

    def restore(self, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        import torch

        from qcli.core.weight import QuantizedWeight

        packed = tensors[f"{layer}.weight_packed"]
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        tables = {
            nvfp4.SCALE: tensors[f"{layer}.weight_scale"].view(torch.uint8),
            nvfp4.DIVISOR: tensors[f"{layer}.weight_global_scale"],
        }
        return QuantizedWeight(self.format, self.shape, codes, tables)


class _StorageConfig:
    """The parsed `quantization_config`."""

    def __init__(self, config: Mapping[str, Any], extents: Mapping[str, Extent]) -> None:
        self._extents = extents
        try:
            groups = list(config["config_groups"].values())
            inputs = [group["input_activations"] for group in groups]
            if inputs.count(inputs[0]) < len(inputs) or inputs[0] not in (None, _FP8_INPUTS):
                raise ValueError
            self.activations = None if inputs[0] is None else Activations(type="float")
            self._schemes = [(re.compile(t.removeprefix("re:")), _format(g)) for g in groups for t in g["targets"]]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, re.error):
            raise VerificationError("quantization_config is not understood") from None

    def layer(self, name: str) -> LayerStorage | None:
        """How a layer is stored, by its tensors in the file; None: dense."""
        if f"{name}.weight_scale" not in self._extents:
            return None
        format = next((format for pattern, format in self._schemes if pattern.fullmatch(name)), None)
        match format:
            case FP8():
                return _FP8Layer(format, self._matrix(f"{name}.weight"))
            case NVFP4():
                rows, width = self._matrix(f"{name}.weight_packed")
                return _NVFP4Layer(format, (rows, 2 * width))
            case Affine() if (shape := self._extents.get(f"{name}.weight_shape")) is not None:
                raw = read_bytes(shape)
                if len(raw) == 16:
                    rows, columns = (int.from_bytes(half, "little") for half in (raw[:8], raw[8:]))
                    return _AffineLayer(format, (rows, columns))
        raise VerificationError(f"quantization_config has no scheme for {name}")

    def _matrix(self, name: str) -> tuple[int, int]:
        extent = self._extents.get(name)
        if extent is None or len(extent.stored.shape) != 2:
            raise VerificationError(f"there is no matrix {name}", hint="copy the checkpoint again")
        rows, columns = extent.stored.shape
        return rows, columns


def _patterns(members: Sequence[Linear], family: Family, count: int) -> list[str]:
    """Regular expressions that match these layers, one for each kind, whatever prefix an engine gives their names.

    transformers has `model.language_model.layers` where vLLM has `language_model.model.layers`
    (vllm/model_executor/models/gemma3_mm.py).
    """
    blocks = family.blocks
    path = re.escape(blocks).replace(r"model\.language_model\.", r"language_model\.(model\.)?")
    kinds: dict[str, list[int]] = {}
    for layer in members:
        kinds.setdefault(layer.name.removeprefix(f"{blocks}.{layer.block}."), []).append(layer.block)
    return [
        rf"re:.*{path}\."
        + (r"\d+" if len(numbers) == count else f"({'|'.join(map(str, numbers))})")
        + rf"\.{re.escape(kind)}$"
        for kind, numbers in kinds.items()
    ]


def _arguments(format: Storable) -> dict[str, Any]:
    common = {"num_bits": format.bits, "dynamic": False}
    match format:
        case FP8():
            return common | {"type": "float", "symmetric": True, "strategy": "channel", "group_size": None}
        case NVFP4():
            scale = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
            size = {"strategy": "tensor_group", "group_size": nvfp4.BLOCK}
            return common | {"type": "float", "symmetric": True} | size | scale
    whole_row = format.group_size == -1
    return common | {
        "type": "int",
        "symmetric": format.zero_point == "none",
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else format.group_size,
    }


def _format(group: Mapping[str, Any]) -> Storable:
    """Inverse of `_arguments`."""
    weights = group["weights"]
    format: Storable
    if weights["type"] == "float":
        format = FP8() if weights["num_bits"] == 8 else NVFP4()
    else:
        size = -1 if weights["strategy"] == "channel" else weights["group_size"]
        format = Affine(
            bits=weights["num_bits"], group_size=size, zero_point="none" if weights["symmetric"] else "integer"
        )
    if _arguments(format) != weights:
        raise ValueError
    return format

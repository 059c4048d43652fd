"""compressed-tensors `pack-quantized`, as that package writes it since 0.18: the affine format.

Codes and integer zero points are stored as in the native layout. In addition, each weight has a `weight_shape`, and the
config has one group for each distinct scheme, which finds its layers by regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli.core.activations import Activations
from qcli.core.formats.affine import Affine
from qcli.models.families import Family, Linear
from qcli.models.quantized import LayerStorage, QuantizedSource, stored_tensors
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError
from qcli.utils.safetensors import Extent, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

__all__ = ["CompressedTensorsSource"]

NAME, _FORMAT = "compressed-tensors", "pack-quantized"


def tensors(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors on disk, by full name.

    Args:
        weight: affine, without floating-point zero points.
    """
    import torch

    return stored_tensors(layer, weight) | {f"{layer}.weight_shape": torch.tensor(weight.shape)}


def quantization_config(
    layers: Sequence[Linear], family: Family, formats: Mapping[str, Affine | None]
) -> dict[str, Any]:
    """The checkpoint's `quantization_config`.

    Args:
        layers: all quantizable layers of the model.
        formats: by layer name; None: dense.
    """
    schemes: dict[Affine | None, list[Linear]] = {}
    for layer in layers:
        schemes.setdefault(formats[layer.name], []).append(layer)
    dense = schemes.pop(None, [])
    count = 1 + max(layer.block for layer in layers)
    groups = {
        f"group_{number}": {
            "targets": _patterns(members, family, count),
            "weights": _arguments(format),
            "input_activations": None,
            "output_activations": None,
            "format": _FORMAT,
        }
        for number, (format, members) in enumerate(schemes.items())
        if format is not None
    }
    config = {
        "quant_method": NAME,
        "format": _FORMAT,
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


def transformers_reads(formats: Iterable[Affine], family: Family) -> bool:
    """Whether transformers 5.23 can load a checkpoint with layers of these formats.

    Where it decodes layers at load time, it applies the first group's scheme to all of them.
    """
    distinct = set(formats)
    return len(distinct) == 1 or not _transformers_decodes(distinct, family)


def _transformers_decodes(formats: Collection[Affine], family: Family) -> bool:
    """Whether transformers has to decode layers at load time: it keeps those packed that are nn.Linear itself, and
    have no zero points."""
    return family.own_linear or any(format.zero_point != "none" for format in formats)


class CompressedTensorsSource(QuantizedSource):
    """A folder that `qcli pack` wrote in this layout."""

    def _storage_config(self, config: dict[str, Any]) -> _StorageConfig:
        return _StorageConfig(config, self.extents)


class _LayerStorage(LayerStorage):
    """An affine layer with its `weight_shape`."""

    def stored(self, layer: str) -> dict[str, StoredTensor]:
        return super().stored(layer) | {f"{layer}.weight_shape": StoredTensor("I64", (2,))}


class _StorageConfig:
    """The parsed `quantization_config`."""

    activations: Activations | None = None

    def __init__(self, config: Mapping[str, Any], extents: Mapping[str, Extent]) -> None:
        self._extents = extents
        try:
            groups = list(config["config_groups"].values())
            self._schemes = [(re.compile(t.removeprefix("re:")), _format(g)) for g in groups for t in g["targets"]]
        except (AttributeError, KeyError, TypeError, ValueError, re.error):
            raise VerificationError("quantization_config is not understood") from None

    def layer(self, name: str) -> LayerStorage | None:
        """How a layer is stored, by the `weight_shape` in the file; None: dense."""
        if (shape := self._extents.get(f"{name}.weight_shape")) is None:
            return None
        format = next((format for pattern, format in self._schemes if pattern.fullmatch(name)), None)
        raw = read_bytes(shape)
        if format is None or len(raw) != 16:
            raise VerificationError(f"quantization_config has no scheme for {name}")
        return _LayerStorage(format, (int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")))


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


def _arguments(format: Affine) -> dict[str, Any]:
    whole_row = format.group_size == -1
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.zero_point == "none",
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else format.group_size,
        "dynamic": False,
    }


def _format(group: Mapping[str, Any]) -> Affine:
    """Inverse of `_arguments`."""
    weights = group["weights"]
    size = -1 if weights["strategy"] == "channel" else weights["group_size"]
    format = Affine(bits=weights["num_bits"], group_size=size, zero_point="none" if weights["symmetric"] else "integer")
    if _arguments(format) != weights:
        raise ValueError
    return format

"""The native layout: quantized layers are stored as the tensors of their format, under its own names.

`config.json > quantization_config` has formats and shapes, the manifest how the checkpoint was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from qcli.core.activations import Activations
from qcli.core.weight import Format, from_spec
from qcli.models.families import Linear
from qcli.models.manifest import FORMAT_VERSION
from qcli.models.quantized import LayerStorage, QuantizedSource
from qcli.utils.errors import VerificationError


def quantization_config(
    layers: Sequence[Linear], formats: Mapping[str, Format | None], activations: Activations | None = None
) -> dict[str, Any]:
    """The checkpoint's `quantization_config`.

    Layers that have the same format and shape in every block share an entry, with `*` for the block; others have one
    each. The first match applies.

    Args:
        layers: all quantizable layers of the model.
        formats: by layer name; None: dense.
        activations: how the inputs of the quantized layers are quantized; None: not at all.
    """
    kinds: dict[str, list[Linear]] = {}
    for layer in layers:
        head, _, tail = layer.name.partition(f".{layer.block}.")
        kinds.setdefault(f"{head}.*.{tail}", []).append(layer)
    entries: list[dict[str, Any]] = []
    dense: list[str] = []
    for pattern, members in kinds.items():
        uniform = len({(formats[member.name], member.shape) for member in members}) == 1
        for match, member in [(pattern, members[0])] if uniform else [(m.name, m) for m in members]:
            format = formats[member.name]
            if format is None:
                dense.append(match)
            else:
                entries.append({"match": match, "shape": list(member.shape), **format.spec()})
    config = {"quant_method": "qcli", "format_version": FORMAT_VERSION, "layers": entries, "dense": dense}
    return config if activations is None else config | {"activations": activations.model_dump()}


class NativeSource(QuantizedSource):
    """A folder that `qcli quantize` wrote, or `qcli pack --format qcli`."""

    def _storage_config(self, config: dict[str, Any]) -> NativeStorage:
        return NativeStorage(config)


class NativeStorage:
    """A parsed `quantization_config`; see `StorageConfig`.

    Attributes:
        activations: how the inputs of quantized layers are quantized when the model runs; None: not at all.

    Raises:
        VerificationError: the version is another one, or an entry is invalid.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise VerificationError(
                f"checkpoint format version {version!r} is not supported, this qcli reads version {FORMAT_VERSION}",
                hint="use the version of qcli named in its qcli.manifest.json",
            )
        layers, dense = config.get("layers"), config.get("dense", [])
        unknown = sorted(config.keys() - {"quant_method", "format_version", "layers", "dense", "activations"})
        if not isinstance(layers, list) or not isinstance(dense, list) or unknown:
            raise VerificationError(
                f"quantization_config is not understood (unknown: {', '.join(unknown) or 'layers'})"
            )
        self._entries: list[tuple[str, LayerStorage | None]] = [(str(pattern), None) for pattern in dense]
        self._entries += [_entry(entry) for entry in layers]
        self.activations = _activations(config["activations"]) if "activations" in config else None

    def layer(self, name: str) -> LayerStorage | None:
        """How the layer with this module name is stored; None: dense."""
        return next((storage for pattern, storage in self._entries if fnmatchcase(name, pattern)), None)


def _entry(entry: Any) -> tuple[str, LayerStorage]:
    try:
        spec = dict(entry)
        pattern, (rows, columns) = spec.pop("match"), spec.pop("shape")
        if not isinstance(pattern, str) or not (isinstance(rows, int) and isinstance(columns, int)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise VerificationError(f"quantization_config: a layer entry is not understood: {entry!r:.80}") from None
    return pattern, LayerStorage(from_spec(spec), (rows, columns))


def _activations(spec: Any) -> Activations:
    try:
        return Activations.model_validate(spec)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["activations", *map(str, first["loc"])])
        raise VerificationError(f"quantization_config: {place}: {first['msg']}") from None

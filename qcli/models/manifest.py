"""The native checkpoint: what `config.json` says of it, reading it back as a model, and its manifest.

A checkpoint is a Hugging Face model folder whose quantized layers hold the tensors of their format. Scalars live
in `config.json > quantization_config`; the manifest has the hashes and the story.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qcli.core.activations import Activations
from qcli.core.weight import Format, from_spec
from qcli.models.families import Linear
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError
from qcli.utils.files import read_json, sha256, sync_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.core.weight import QuantizedWeight

FORMAT_VERSION = 1
_MANIFEST_TYPES = {
    "files": dict,
    "layers": list,
    "recipe": dict,
    "source": dict,
    "versions": dict,
    "bits_per_weight": float,
    "seconds": float,
}
MANIFEST, RECIPE = "qcli.manifest.json", "recipe.yaml"


def quantization_config(
    layers: Sequence[Linear], formats: Mapping[str, Format | None], activations: Activations | None = None
) -> dict[str, Any]:
    """What the checkpoint's `config.json` says of its layers.

    A kind of layer that has one format in every block is one entry with `*` for the block; where blocks differ,
    each layer has its own entry. The first match counts.

    Args:
        layers: all quantizable layers of the model.
        formats: by layer name; None for those that stay dense.
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


@dataclass(frozen=True)
class Packed:
    """Format and shape `(out_features, in_features)` of a quantized layer."""

    format: Format
    shape: tuple[int, int]

    def stored(self, layer: str) -> dict[str, StoredTensor]:
        """The layer's tensors on disk, by full name."""
        return {f"{layer}.{suffix}": tensor for suffix, tensor in self.format.stored(self.shape).items()}

    def restore(self, layer: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The weight, from its tensors by full name."""
        suffixes = self.format.stored(self.shape)
        return self.format.from_stored({suffix: tensors[f"{layer}.{suffix}"] for suffix in suffixes}, self.shape)


def stored_tensors(layer: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Inverse of `Packed.restore`."""
    return {f"{layer}.{suffix}": tensor for suffix, tensor in weight.format.to_stored(weight).items()}


class Layout:
    """`quantization_config` read back: the format of each layer.

    Attributes:
        activations: how the inputs of the quantized layers are quantized while the model runs; None: not at all.

    Raises:
        VerificationError: another version, an unknown format, or entries that are not understood.
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
        self._entries: list[tuple[str, Packed | None]] = [(str(pattern), None) for pattern in dense]
        self._entries += [_entry(entry) for entry in layers]
        self.activations = _activations(config["activations"]) if "activations" in config else None

    def packed(self, layer: str) -> Packed | None:
        """How a layer is stored, by its module name; None when it is dense."""
        return next((packed for pattern, packed in self._entries if fnmatchcase(layer, pattern)), None)


def _entry(entry: Any) -> tuple[str, Packed]:
    try:
        spec = dict(entry)
        pattern, (rows, columns) = spec.pop("match"), spec.pop("shape")
        if not isinstance(pattern, str) or not (isinstance(rows, int) and isinstance(columns, int)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise VerificationError(f"quantization_config: a layer entry is not understood: {entry!r:.80}") from None
    return pattern, Packed(from_spec(spec), (rows, columns))


def _activations(spec: Any) -> Activations:
    try:
        return Activations.model_validate(spec)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["activations", *map(str, first["loc"])])
        raise VerificationError(f"quantization_config: {place}: {first['msg']}") from None


def versions() -> dict[str, str]:
    """Of what decides a run's bytes."""
    import torch
    import transformers

    from qcli import __version__

    return {
        "qcli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def write_manifest(folder: Path, story: Mapping[str, Any]) -> None:
    """Hash every file of a finished folder and write the manifest, the last file of all.

    Args:
        story: what else is known of how the folder came to be.
    """
    for file in folder.iterdir():
        sync_file(file)
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    recipe = json.dumps(story["recipe"], sort_keys=True)
    manifest = {
        "format_version": FORMAT_VERSION,
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        **story,
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        VerificationError: there is none, or it is not one.
    """
    file = folder / MANIFEST
    try:
        manifest = read_json(file)
        complete = (
            all(isinstance(manifest[key], kind) for key, kind in _MANIFEST_TYPES.items())
            and all({"bytes", "sha256"} <= entry.keys() for entry in manifest["files"].values())
            and all("name" in layer for layer in manifest["layers"])
        )
    except FileNotFoundError:
        raise VerificationError(f"{file} is missing", hint="is this a checkpoint that qcli wrote?") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise VerificationError(f"{file} is not a manifest", hint="copy the checkpoint again")
    return dict(manifest)

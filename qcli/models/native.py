"""The native layout: quantized layers are stored as the tensors of their format, under its own names.

`config.json > quantization_config` has formats and shapes, the manifest how the checkpoint was made.

A loader that does not know `quant_method: qcli` would ignore it, initialize all layers whose `weight` it misses, and
only warn, as transformers does without the plug-in. So one layer has a `weight`, the guard: a tensor without elements,
whose shape every loader refuses. Version 1 of the format had none, and is still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from qcli.core.activations import Activations
from qcli.core.weight import Format, from_spec
from qcli.models.families import Linear
from qcli.models.manifest import FORMAT_VERSION
from qcli.models.quantized import LayerStorage, QuantizedSource
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError
from qcli.utils.safetensors import Extent
from qcli.utils.text import with_wildcards

LOADING = """Loads in transformers after `import qcli`, and stays packed. Without that line loading fails.

```python
import qcli  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR")
```"""
GUARD = StoredTensor("U8", (0,))
_VERSIONS = (1, FORMAT_VERSION)
_KEYS = {"quant_method", "format_version", "guard", "layers", "dense", "activations", "vocabulary"}
_Stored = TypeVar("_Stored")


def guard_name(formats: Mapping[str, Format | None]) -> str:
    """The name of a checkpoint's guard: the dense weight of its first quantized layer.

    Args:
        formats: by layer name, in order; None: dense. At least one layer is quantized.
    """
    return next(f"{layer}.weight" for layer, format in formats.items() if format is not None)


def guard_extent(file: Path) -> Extent:
    """The guard's place in a file: nowhere, as it has no bytes."""
    return Extent(file, GUARD, 0, GUARD.bytes)


def with_guard(parts: Sequence[Mapping[str, _Stored]], name: str, guard: _Stored) -> list[Mapping[str, _Stored]]:
    """A checkpoint's tensors, in their parts, with the guard as the last of them."""
    return [*parts[:-1], {**parts[-1], name: guard}]


def quantization_config(
    layers: Sequence[Linear],
    formats: Mapping[str, Format | None],
    activations: Activations | None = None,
    vocabulary: Mapping[str, LayerStorage] | None = None,
    outside: Iterable[str] = (),
) -> dict[str, Any]:
    """The checkpoint's `quantization_config`.

    Layers that have the same format and shape in every block and expert share an entry, with `*` for the number; others
    have one each. The first match applies.

    Args:
        layers: all quantizable layers of the model.
        formats: by layer name; None: dense.
        activations: how the inputs of the quantized layers are quantized; None: not at all.
        vocabulary: how embedding and head are stored, by module name, as far as they are quantized.
        outside: names of modules that are no quantizable layers: no shared entry may match them.
    """
    others = list(outside)
    kinds: dict[str, list[Linear]] = {}
    for layer in layers:
        head, _, tail = layer.name.partition(f".{layer.block}.")
        kinds.setdefault(f"{head}.*.{with_wildcards(tail)}", []).append(layer)
    entries: list[dict[str, Any]] = []
    dense: list[str] = []
    for pattern, members in kinds.items():
        uniform = len({(formats[member.name], member.shape) for member in members}) == 1
        uniform = uniform and not any(fnmatchcase(name, pattern) for name in others)
        for match, member in [(pattern, members[0])] if uniform else [(m.name, m) for m in members]:
            format = formats[member.name]
            if format is None:
                dense.append(match)
            else:
                entries.append(_described(match, LayerStorage(format, member.shape)))
    config = {
        "quant_method": "qcli",
        "format_version": FORMAT_VERSION,
        "guard": guard_name({layer.name: formats[layer.name] for layer in layers}),
        "layers": entries,
        "dense": dense,
    }
    if vocabulary:
        config["vocabulary"] = [_described(name, storage) for name, storage in vocabulary.items()]
    return config if activations is None else config | {"activations": activations.spec()}


def _described(match: str, storage: LayerStorage) -> dict[str, Any]:
    return {"match": match, "shape": list(storage.shape), **storage.format.spec()}


class NativeSource(QuantizedSource):
    """A folder that `qcli quantize` wrote, or `qcli pack --format qcli`."""

    _storage: NativeStorage

    def _storage_config(self, config: dict[str, Any]) -> NativeStorage:
        return NativeStorage(config)

    def config_to_write(self) -> dict[str, Any]:
        """As of the current version, whatever version the folder has."""
        config = super().config_to_write()
        current = {"format_version": FORMAT_VERSION, "guard": self._guard}
        return config | {"quantization_config": config["quantization_config"] | current}

    def parts_to_write(self, changed: Mapping[str, Extent] | None = None) -> list[Mapping[str, Extent]]:
        """All stored tensors by their names on disk, a part each, as `shards.join` takes them; with the guard.

        Args:
            changed: tensors that replace the checkpoint's.
        """
        changed = changed or {}
        own: list[Mapping[str, Extent]] = []
        for name, stored in (self.extents | self.derived).items():
            extent = changed.get(name, stored)
            if isinstance(extent, Extent):
                own.append(self.as_on_disk(name, extent, extent.rows))
            else:
                own.append({part: piece for part, piece in extent.joined if isinstance(piece, Extent)})
                assert own[-1], f"{name} is no stored tensor, and not joined from such"
        return with_guard(own, self.on_disk(self._guard), guard_extent(self.weight_files()[0]))

    @property
    def vocabulary(self) -> Mapping[str, LayerStorage]:
        return self._storage.vocabulary

    @property
    def _guard(self) -> str:
        return guard_name({layer: storage.format for layer, storage in self.quantized.items()})

    def _check(self) -> None:
        guard = self._storage.guard
        extent = None if guard is None else self.extents.pop(guard, None)
        if guard is not None and (extent is None or extent.stored != GUARD):
            raise VerificationError(f"{self.path} has no guard {guard}, its config says so", hint="copy it again")
        super()._check()


class NativeStorage:
    """A parsed `quantization_config`; see `StorageConfig`.

    Attributes:
        activations: how the inputs of quantized layers are quantized when the model runs; None: not at all.
        guard: name of the guard; None: version 1 has none.
        vocabulary: embedding and head, by module name, as far as they are quantized.

    Raises:
        VerificationError: the version is another one, or an entry is invalid.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = config.get("format_version")
        if version not in _VERSIONS or isinstance(version, bool):
            raise VerificationError(
                f"checkpoint format version {version!r} is not supported, this qcli reads 1 to {FORMAT_VERSION}",
                hint="use the version of qcli named in its qcli.manifest.json",
            )
        layers, dense, guard = config.get("layers"), config.get("dense", []), config.get("guard")
        vocabulary, unknown = config.get("vocabulary", []), sorted(config.keys() - _KEYS)
        if not isinstance(guard, str) and (guard is not None or version != 1):
            raise VerificationError(f"quantization_config: guard: must be the name of a tensor, not {guard!r}")
        if not isinstance(layers, list) or not isinstance(dense, list) or not isinstance(vocabulary, list) or unknown:
            raise VerificationError(
                f"quantization_config is not understood (unknown: {', '.join(unknown) or 'layers'})"
            )
        self.guard: str | None = guard
        self._entries: list[tuple[str, LayerStorage | None]] = [(str(pattern), None) for pattern in dense]
        self._entries += [_entry(entry) for entry in layers]
        self.vocabulary = dict(map(_vocabulary_entry, vocabulary))
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


def _vocabulary_entry(entry: Any) -> tuple[str, LayerStorage]:
    """As `_entry`, of a format whose rows can be decoded one by one."""
    name, storage = _entry(entry)
    if any(stored.shape[0] != storage.shape[0] for stored in storage.format.stored(storage.shape).values()):
        raise VerificationError(f"quantization_config: {name}: no row of its format can be decoded alone")
    return name, storage


def _activations(spec: Any) -> Activations:
    try:
        return Activations.model_validate(spec)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["activations", *map(str, first["loc"])])
        raise VerificationError(f"quantization_config: {place}: {first['msg']}") from None

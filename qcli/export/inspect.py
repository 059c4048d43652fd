"""What a checkpoint holds, how it was made, and what computes it here, from its config, headers and manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcli.models.contents import stored_contents
from qcli.models.loadable import require_loadable
from qcli.models.manifest import MANIFEST, LayerReport, Manifest
from qcli.models.open import ModelSource, open_source
from qcli.models.quantized import QuantizedSource
from qcli.models.vocabulary import Vocabulary
from qcli.utils.errors import QcliError, UsageError, VerificationError


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's contents and origin.

    Attributes:
        model: the model that was quantized.
        bytes: size of the weight files.
        contents: these by kind, see `qcli.models.contents`; None: transformers does not build this model.
        seconds: duration of the quantization.
        versions: of qcli and its dependencies at that time.
        packed_as: the export target that `qcli pack` wrote; None: the folder is as `qcli quantize` left it.
        notes: the target's remarks, by label.
        fallbacks: number of layers with steps that did not go as configured.
        activations: how the inputs of quantized layers are quantized; None: not at all.
        facts: mean over the weights of what formats report of them.
        runs_on: the device and dtype of this machine that a command would choose; None: no layer is packed.
        missed_backends: faster backends than those that compute the layers there, with the reason and the number of
            layers; those of other devices are left out.
        layers: a row for every quantizable layer.
        vocabulary: a row for embedding and head each, as far as they are quantized.
    """

    folder: str
    model: str
    family: str
    bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    contents: dict[str, int] | None
    seconds: float
    versions: dict[str, str]
    packed_as: str | None
    notes: dict[str, str]
    recipe: dict[str, Any]
    fallbacks: int
    activations: dict[str, Any] | None
    facts: dict[str, float]
    runs_on: dict[str, str] | None
    missed_backends: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    vocabulary: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class ModelInspection:
    """A model that qcli has not written, as commands read it.

    Attributes:
        quantized_as: what other software stored the weights as; None: they are not quantized.
        context_length: in tokens; None: its config sets no limit.
        revision: the hub's commit; None: it is local.
        contents: as of an `Inspection`.
        layers: a row for every linear layer of the blocks.
    """

    model: str
    family: str
    quantized_as: str | None
    context_length: int | None
    revision: str | None
    bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    contents: dict[str, int] | None
    layers: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def inspect_any(model: str) -> Inspection | ModelInspection:
    """Inspect a checkpoint or any other model that qcli reads; weights are not read.

    Raises:
        UsageError: it is no model, or a checkpoint of qcli without its manifest.
        VerificationError: its parts do not agree.
    """
    folder = Path(model).expanduser()
    if (folder / MANIFEST).exists():
        return inspect(folder)
    source = open_source(model)
    if isinstance(source, QuantizedSource):
        return inspect(folder)
    linears = source.linears()
    return ModelInspection(
        model=model,
        family=source.family.model_type,
        quantized_as=source.quantized_as,
        context_length=source.context_length,
        revision=None if source.hub is None else source.hub.commit,
        bits_per_weight=source.linear_bits_per_weight(),
        model_bits_per_weight=source.model_bits_per_weight(),
        bytes=source.bytes(),
        contents=_contents(source),
        layers=[
            {
                "name": linear.name,
                "shape": list(linear.shape),
                "stored_as": source.stored_as(f"{linear.name}.weight"),
                "bits_per_weight": source.bits_of([linear.name]),
            }
            for linear in linears
        ],
    )


def inspect(folder: Path) -> Inspection:
    """Inspect a checkpoint, packed or not; weights are not read.

    Formats come from the checkpoint's config, or, where its layout has none (gguf, dense), from the manifest;
    `stored_as` and bits per weight are always those of the files.

    Raises:
        UsageError: it is not a qcli checkpoint.
        VerificationError: its parts do not agree.
    """
    source = open_source(str(folder))
    if not (folder / MANIFEST).exists():
        raise UsageError(f"{folder} is not a qcli checkpoint", hint="`qcli quantize` writes one")
    manifest = Manifest.read(folder)
    rows = _rows(source, manifest)
    runs_on, missed = _add_backends(rows, source)
    return Inspection(
        folder=str(folder),
        model=manifest.source.model,
        family=source.family.model_type,
        bits_per_weight=source.bits_of(layer.name for layer in manifest.layers),
        model_bits_per_weight=source.model_bits_per_weight(),
        bytes=source.bytes(),
        contents=_contents(source),
        seconds=manifest.seconds,
        versions=manifest.versions,
        packed_as=manifest.packed_as,
        notes=manifest.notes,
        recipe=manifest.recipe,
        fallbacks=sum(bool(layer.fallbacks) for layer in manifest.layers),
        activations=None if source.activations is None else source.activations.spec(),
        facts=manifest.facts,
        runs_on=runs_on,
        missed_backends=missed,
        layers=rows,
        vocabulary=[_vocabulary_row(source, report, manifest) for report in manifest.vocabulary],
    )


def _contents(source: ModelSource) -> dict[str, int] | None:
    try:
        model = require_loadable(source)
    except QcliError:  # what is wrong with a model is not the subject here
        return None
    return stored_contents(source, Vocabulary.of(model, source.tensors()))


def _rows(source: ModelSource, manifest: Manifest) -> list[dict[str, Any]]:
    reports = {layer.name: layer for layer in manifest.layers}
    quantized = source.quantized if isinstance(source, QuantizedSource) else None
    linears = source.linears()
    known = {linear.name for linear in linears}
    if mismatched := reports.keys() - known if quantized is None else reports.keys() ^ quantized.keys():
        raise VerificationError(f"{source.path}: weights and manifest disagree about {min(mismatched)}")
    rounded = set(manifest.rounded)
    rows: list[dict[str, Any]] = []
    for linear in linears:
        name, report = linear.name, reports.get(linear.name)
        row: dict[str, Any] = {"name": name, "shape": list(linear.shape)}
        if quantized is None:
            row["stored_as"] = source.stored_as(f"{name}.weight")
        if report is None:
            rows.append(row | {"method": None, "format": None, "why_dense": "recipe override"})
            continue
        spec = report.spec if quantized is None else quantized[name].format.spec()
        row |= {"method": report.method, **spec, "bits_per_weight": source.bits_of([name])}
        if name not in rounded:  # the error was measured before the layer was requantized
            row |= {"error": report.error, "measure": report.measure}
        rows.append(row | {"fallbacks": report.fallbacks} | report.facts)
    return rows


def _vocabulary_row(source: ModelSource, report: LayerReport, manifest: Manifest) -> dict[str, Any]:
    """A quantized embedding or head.

    Raises:
        VerificationError: the files have no such tensor.
    """
    name = report.name
    if (stored := source.tensors().get(f"{name}.weight")) is None:
        raise VerificationError(f"{source.path}: weights and manifest disagree about {name}")
    row: dict[str, Any] = {"name": name, "shape": list(stored.shape), "method": report.method, **report.spec}
    if not isinstance(source, QuantizedSource):
        row["stored_as"] = source.stored_as(f"{name}.weight")
    if name not in manifest.rounded:
        row |= {"error": report.error, "measure": report.measure}
    return row | {"bits_per_weight": source.bits_of([name]), "fallbacks": report.fallbacks}


def _add_backends(
    rows: list[dict[str, Any]], source: ModelSource
) -> tuple[dict[str, str] | None, list[dict[str, Any]]]:
    """Add to the rows of packed layers the backend that computes them here; `runs_on` and `missed_backends`."""
    if not isinstance(source, QuantizedSource) or not source.quantized:
        return None, []
    from qcli.inference.served import backend_of, own_dtype
    from qcli.utils.device import resolve_device

    device = resolve_device("auto")
    dtype = own_dtype(source, device)
    missed: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if (layer := source.quantized.get(row["name"])) is not None:
            choice = backend_of(layer.format, layer.shape, device.type, dtype)
            row["backend"] = choice.backend.name
            missed.update(choice.reasons.items())
    reasons = [{"name": name, "reason": reason, "layers": count} for (name, reason), count in missed.items()]
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}, reasons

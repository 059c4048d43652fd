"""What a checkpoint holds and how it came to be, from its config, headers and manifest. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcli import checkpoint
from qcli.errors import UsageError
from qcli.models.packed import PackedSource
from qcli.models.source import open_source


@dataclass(frozen=True)
class Inspection:
    """Facts of one checkpoint; `layers` has a row for every quantizable layer.

    Attributes:
        activations: how the inputs of quantized layers are quantized; None: not at all.
    """

    folder: str
    model: str
    family: str
    bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    seconds: float
    versions: dict[str, str]
    recipe: dict[str, Any]
    fallbacks: int
    activations: dict[str, Any] | None
    layers: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def inspect(folder: Path) -> Inspection:
    """Read headers, config and manifest of a checkpoint.

    Raises:
        UsageError: it is not a qcli checkpoint.
        VerificationError: its parts do not agree.
    """
    source = open_source(str(folder))
    if not isinstance(source, PackedSource):
        raise UsageError(f"{folder} is not a checkpoint that qcli wrote", hint="`qcli quantize` makes one")
    manifest = checkpoint.read_manifest(folder)
    reports = {layer["name"]: layer for layer in manifest["layers"]}
    rows: list[dict[str, Any]] = []
    for linear in source.linears():
        packed = source.packed.get(linear.name)
        row: dict[str, Any] = {"name": linear.name, "shape": list(linear.shape)}
        if packed is None:
            rows.append(row | {"method": None, "format": None, "why_dense": "recipe override"})
            continue
        report = reports[linear.name]
        rows.append(
            row
            | {"method": report["method"], **packed.format.spec()}
            | {key: report[key] for key in ("bits_per_weight", "error", "measure", "fallbacks")}
            | report.get("facts", {})
        )
    return Inspection(
        folder=str(folder),
        model=manifest["source"]["model"],
        family=source.family.model_type,
        bits_per_weight=source.bits_per_weight(),
        model_bits_per_weight=source.model_bits_per_weight(),
        bytes=source.bytes(),
        seconds=manifest["seconds"],
        versions=manifest["versions"],
        recipe=manifest["recipe"],
        fallbacks=sum(bool(layer["fallbacks"]) for layer in manifest["layers"]),
        activations=None if source.activations is None else source.activations.model_dump(),
        layers=rows,
    )

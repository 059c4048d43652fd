"""The manifest of a checkpoint, `qcli.manifest.json`: how it was made, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qcli.algorithms.training.outcome import Outcome
from qcli.utils.errors import VerificationError
from qcli.utils.files import sha256, sync_file, write_json

FORMAT_VERSION = 1
MANIFEST, RECIPE = "qcli.manifest.json", "recipe.yaml"


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


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceModel:
    """The model that was quantized: a folder or hub id, and the fingerprint of its config and headers."""

    model: str
    fingerprint: str


@dataclass(frozen=True)
class LayerReport:
    """How one layer was quantized.

    Attributes:
        spec: its format, as `Format.spec` writes it.
        error: relative squared error of the method's result, before any refinement of its block; of the output on
            the layer's calibration inputs, before any norm, against the method's target (`measure: output`), or of
            the weight itself where no data was used (`measure: weight`).
        fallbacks: every step that did not go as configured.
        facts: further properties of the weight that its format reports.
    """

    name: str
    method: str
    spec: dict[str, Any]
    bits_per_weight: float
    error: float
    measure: str
    fallbacks: list[str]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialReport:
    """A recipe that automatic allocation quantized, KL divergences in nats per token; None: not finite."""

    bits_per_weight: float
    predicted_kl: float
    measured_kl: float | None


@dataclass(frozen=True)
class AllocationReport:
    """How automatic allocation chose the bits.

    Attributes:
        target_bpw: bits per weight that the layers were to have on average.
        shipped: the trial that became the checkpoint.
        held_out_samples: number of calibration samples that the trials were compared on.
        sensitivity: by layer and option, the KL divergence if only that layer is quantized; None: not an option.
    """

    target_bpw: float | None
    shipped: str
    trials: dict[str, TrialReport]
    held_out_samples: int
    sensitivity: dict[str, dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class DistillationReport:
    """One distillation of a checkpoint.

    Attributes:
        text: the `distill_text` section of its recipe.
        text_identity: of that text; None: the model's own, or unknown, as in checkpoints that do not record it.
        measure: the loss of `outcome`.
        blocks: where blocks were trained one by one, how each went.
        peak_memory: bytes, by device.
    """

    teacher: str
    text: dict[str, Any]
    text_identity: str | None = None
    tokens_sha256: str
    seed: int
    measure: str
    outcome: Outcome
    blocks: list[Outcome]
    seconds: float
    peak_memory: dict[str, int]


class Manifest(BaseModel):
    """What `qcli.manifest.json` records of a checkpoint: how it was made, and the hash of every file.

    A field without a default is in every manifest; the others came with later versions or with commands that not
    every checkpoint has been through, and are written only where they are set. Keys that this version does not know
    are ignored, so that it reads the manifests of newer ones; a checkpoint derived from such a one does not repeat
    them, as nobody can tell whether they hold for it.

    Attributes:
        format_version: of the checkpoint; set by `write`.
        recipe_sha256: of `recipe` as JSON with sorted keys; set by `write`.
        versions: of qcli and of what else decides a run's bytes.
        recipe: as plain data, with every default.
        calibration_tokens_sha256: None: quantized without calibration data.
        calibration_text_identity: of the calibration text; None: the model's own text, or unknown.
        bits_per_weight: of the quantized layers, every stored table counted.
        model_bits_per_weight: of the whole model.
        bytes: of the weights.
        training: how each training went, by what was trained, as `block 0 refine`.
        unscaled: linears that transforms were to scale and that have no fold.
        dense: why each tensor that is not quantized is not, by layer or tensor name.
        peak_memory: bytes, by device.
        files: every other file of the folder, by name; set by `write`.
        distilled: its distillations, first to last.
        packed_as: the export target that `qcli pack` wrote; None: the folder is as `qcli quantize` left it.
        rounded: layers whose codes an export rounded again.
        notes: remarks of the export target, by label.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: int = FORMAT_VERSION
    recipe_sha256: str = ""
    versions: dict[str, str]
    recipe: dict[str, Any]
    source: SourceModel
    calibration_tokens_sha256: str | None
    calibration_text_identity: str | None = None
    seed: int
    bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    layers: list[LayerReport]
    training: dict[str, Outcome] = Field(default_factory=dict)
    unscaled: list[str] = Field(default_factory=list)
    dense: dict[str, str]
    seconds: float
    peak_memory: dict[str, int]
    allocation: AllocationReport | None = None
    files: dict[str, FileEntry] = Field(default_factory=dict)
    distilled: list[DistillationReport] = Field(default_factory=list)
    packed_as: str | None = None
    rounded: list[str] = Field(default_factory=list)
    notes: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            VerificationError: there is none, or it is not one; the message names the field.
        """
        file = folder / MANIFEST
        try:
            manifest = cls.model_validate_json(file.read_bytes(), strict=True)
        except FileNotFoundError:
            raise VerificationError(f"{file} is missing", hint="is this a checkpoint that qcli wrote?") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            reason = f"{place}: {first['msg']}" if place else first["msg"]
            raise VerificationError(f"{file} is not a manifest: {reason}", hint="copy the checkpoint again") from None
        if not manifest.files:
            raise VerificationError(
                f"{file} is not a manifest: files: no file is listed", hint="copy the checkpoint again"
            )
        return manifest

    def write(self, folder: Path) -> None:
        """Hash every file of a finished folder and write the manifest, the last file of all."""
        for file in folder.iterdir():
            sync_file(file)
        files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
        recipe = json.dumps(self.recipe, sort_keys=True)
        complete = self.model_copy(
            update={
                "format_version": FORMAT_VERSION,
                "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
                "files": {file.name: FileEntry(file.stat().st_size, sha256(file)) for file in files},
            }
        )
        write_json(folder / MANIFEST, complete.model_dump(exclude_unset=True))

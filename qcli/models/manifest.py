"""The manifest of a checkpoint, `qcli.manifest.json`: how it was made, and the hash of every file."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qcli.algorithms.training.outcome import Outcome
from qcli.utils.errors import StateError, UsageError, VerificationError
from qcli.utils.files import files_below, parse_json, reading, sha256, sync_file, sync_folder, write_json
from qcli.utils.sealed import digest

FORMAT_VERSION = 2
_CHECKSUM = "sha256"  # of everything else in the file
_COPY_AGAIN = "copy the checkpoint again"
WEIGHT_FILES = (".safetensors", ".gguf")
MANIFEST, RECIPE = "qcli.manifest.json", "recipe.yaml"


def versions() -> dict[str, str]:
    """Versions of everything that affects a run's bytes, by name."""
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


def recipe_sha256(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


_SECTIONS = {"method": dict, "transforms": list, "low_rank": dict, "refine": dict}  # of recipes, shown by `inspect`


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class OriginalModel:
    """The model that was quantized: its folder, file or hub id, and `ModelSource.fingerprint`.

    Attributes:
        revision: the hub's commit that it is from; None: it was local.
        quantized_as: what its weights were stored as, if other software had quantized them already.
        license: as `license_of` returns it.
    """

    model: str
    fingerprint: str
    quantized_as: str | None = None
    revision: str | None = None
    license: dict[str, str] | None = None


@dataclass(frozen=True)
class LayerReport:
    """How one layer was quantized.

    Attributes:
        spec: its format, as `Format.spec` writes it.
        error: relative squared error of the method's result, before its block is refined: of the layer's output on
            calibration inputs, before any output norm, against the method's target (`measure: output`), or of the
            weight where no data was used (`measure: weight`).
        fallbacks: steps that did not go as configured.
        facts: statistics that the format reports of the final weight.
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
    """A candidate that automatic allocation quantized, with KL divergences in nats per token; None: not finite."""

    bits_per_weight: float
    predicted_kl: float
    measured_kl: float | None


@dataclass(frozen=True)
class AllocationReport:
    """How automatic allocation chose the bits.

    Attributes:
        target_bpw: bits per weight allowed on average.
        shipped: name of the trial that became the checkpoint.
        held_out_samples: number of samples on which trials were compared.
        sensitivity: KL divergence if only this layer is quantized with this option, by layer and option; None: the
            layer does not have the option.
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
        text: the training text, as `Recipe.distill_text`.
        text_identity: of that text; None: sampled from the model, or not recorded.
        bos: whether the samples begin with a begin token; None: not recorded.
        measure: the loss that `outcome` reports.
        blocks: outcome of each block, if they were trained one by one.
        peak_memory: bytes, by kind of memory.
    """

    teacher: str
    text: dict[str, Any]
    text_identity: str | None = None
    bos: bool | None = None
    tokens_sha256: str
    seed: int
    measure: str
    outcome: Outcome
    blocks: list[Outcome]
    seconds: float
    peak_memory: dict[str, int]


class Manifest(BaseModel):
    """What `qcli.manifest.json` records of a checkpoint: how it was made, and the hash of every file.

    Fields without a default are in every manifest. The others belong to later versions or to commands that not every
    checkpoint has been through, and are written only if they are set. Unknown keys are ignored, so that manifests of
    newer versions can be read; checkpoints derived from such a one do not repeat them, since they may not hold there.

    Attributes:
        format_version: of the checkpoint, set by `write`.
        recipe_sha256: `recipe_sha256` of the recipe that the model was quantized by; distillation, which adds its
            options to `recipe`, leaves it.
        versions: as the function `versions` returns them.
        recipe: as plain data, with every default.
        calibration_tokens_sha256: None: quantized without calibration data.
        calibration_bos: whether the calibration samples begin with a begin token; None: not recorded.
        calibration_text_identity: of the calibration text; None: the model's own text, or unknown.
        calibration_images_sha256: SHA-256 of the SHA-256 of each image of the calibration; None: it has none.
        bits_per_weight: of the quantized layers, every stored table counted.
        model_bits_per_weight: of the whole model.
        bytes: of the weights.
        vocabulary: reports of embedding and head, as far as they are quantized.
        facts: mean of each of the layers' `facts` over their weights.
        training: outcome of each training, by its name, such as `block 0 refine`.
        unscaled: paths in a block of linears whose inputs no transform can scale.
        dense: the reason why a layer or tensor was not quantized, by name.
        peak_memory: bytes, by kind of memory (`rss`, `cuda`).
        processes: how many of `torchrun` quantized it, where there were several; sums then have another order.
        files: all other files of the folder, by name, set by `write`.
        distilled: its distillations, in order.
        packed_as: the export target that `qcli pack` wrote; None: the folder is as `qcli quantize` left it.
        rounded: layers that were requantized for the target.
        notes: the target's remarks, by label.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format_version: int = FORMAT_VERSION
    recipe_sha256: str
    versions: dict[str, str]
    recipe: dict[str, Any]
    source: OriginalModel
    calibration_tokens_sha256: str | None
    calibration_text_identity: str | None = None
    calibration_bos: bool | None = None
    calibration_images_sha256: str | None = None
    seed: int
    bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    layers: list[LayerReport]
    vocabulary: list[LayerReport] = Field(default_factory=list)
    facts: dict[str, float] = Field(default_factory=dict)
    training: dict[str, Outcome] = Field(default_factory=dict)
    unscaled: list[str] = Field(default_factory=list)
    dense: dict[str, str]
    seconds: float = Field(ge=0, allow_inf_nan=False)
    peak_memory: dict[str, int]
    processes: int = Field(default=1, ge=1)
    allocation: AllocationReport | None = None
    files: dict[str, FileEntry] = Field(default_factory=dict)
    distilled: list[DistillationReport] = Field(default_factory=list)
    packed_as: str | None = None
    rounded: list[str] = Field(default_factory=list)
    notes: dict[str, str] = Field(default_factory=dict)

    @field_validator("recipe")
    @classmethod
    def _sections(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        for name, kind in _SECTIONS.items():
            if not isinstance(recipe.get(name, kind()), kind):
                raise ValueError(f"{name} is not a {'mapping' if kind is dict else 'list'}")
        if not isinstance(recipe.get("method"), dict):
            raise ValueError("method is missing")
        if not all(isinstance(transform, dict) for transform in recipe.get("transforms", [])):
            raise ValueError("transforms are not mappings")
        return recipe

    @field_validator("layers", "vocabulary")
    @classmethod
    def _specs(cls, layers: list[LayerReport]) -> list[LayerReport]:
        for layer in layers:
            base = layer.spec.get("base", {})
            if not isinstance(layer.spec.get("bits"), int) or not isinstance(base, dict):
                raise ValueError(f"the spec of {layer.name} is not that of a format")
        return layers

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and validate the manifest of a checkpoint.

        Raises:
            VerificationError: there is none, it is not one (the message names the field), or it was changed.
            QcliError: it cannot be read; see `os_problem`.
        """
        file = folder / MANIFEST
        if not folder.is_dir():
            raise UsageError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
        if not file.exists():
            raise VerificationError(
                f"{folder} is not a checkpoint that qcli wrote: it has no {MANIFEST}",
                hint="`qcli quantize`, `distill` and `pack` write them",
            )
        with reading(file):
            content = file.read_bytes()
        _require_checksum(file, content, cls.model_fields.keys())
        try:
            manifest = cls.model_validate_json(content, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            reason = f"{place}: {first['msg']}" if place else first["msg"]
            raise VerificationError(f"{file} is not a manifest: {reason}", hint=_COPY_AGAIN) from None
        if not manifest.files:
            raise VerificationError(f"{file} is not a manifest: files: no file is listed", hint=_COPY_AGAIN)
        return manifest

    def require_weights(self, folder: Path) -> None:
        """Refuse to build on weights that are not those that were written: what is made of them would hide it.

        Raises:
            VerificationError: a file of weights is missing, or its hash differs.
        """
        for name, entry in self.files.items():
            if not name.endswith(WEIGHT_FILES):
                continue
            file = folder / Path(name).name
            if not file.is_file():
                raise VerificationError(f"{file} is listed in the manifest but missing", hint=_COPY_AGAIN)
            if sha256(file) != entry.sha256:
                raise VerificationError(f"{file} has changed: its hash differs from the manifest", hint=_COPY_AGAIN)

    def write(self, folder: Path) -> None:
        """Hash all files of a finished folder and write the manifest, which must be its last file."""
        files = [file for file in files_below(folder) if file.is_file() and file.name != MANIFEST]
        for file in files:
            sync_file(file)
        for inner in {file.parent for file in files} - {folder}:
            sync_folder(inner)
        entries = {file.relative_to(folder).as_posix(): FileEntry(file.stat().st_size, sha256(file)) for file in files}
        complete = self.model_copy(update={"format_version": FORMAT_VERSION, "files": entries})
        content = complete.model_dump(exclude_unset=True)
        write_json(folder / MANIFEST, content | {_CHECKSUM: digest(content)})


def require_own_checkpoint(folder: Path) -> None:
    """Refuse a folder that is anything else than a checkpoint as qcli wrote it: it is about to be replaced.

    Weights are known by their names, all other files by their content.

    Raises:
        StateError: it has no manifest, or a file that qcli did not write or that was edited.
        VerificationError: its manifest is damaged.
        QcliError: it cannot be read; see `os_problem`.
    """
    hint = "move it away, or choose another --out"
    if not (folder / MANIFEST).is_file():
        raise StateError(f"{folder} is not a checkpoint that qcli wrote", hint=hint)
    listed = Manifest.read(folder).files
    for file in files_below(folder):
        name = file.relative_to(folder).as_posix()
        if name != MANIFEST and (file.is_symlink() or name not in listed):
            raise StateError(f"{folder} contains {name}, which qcli did not write", hint=hint)
        if name in listed and not name.endswith(WEIGHT_FILES) and sha256(file) != listed[name].sha256:
            raise StateError(f"{folder} contains {name}, which somebody has edited", hint=hint)


def _require_checksum(file: Path, content: bytes, fields: Container[str]) -> None:
    """Refuse a manifest that is not as it was written. One of an earlier version has no checksum, and only `fields`."""
    try:
        manifest = parse_json(content)
    except ValueError:
        return  # reported where the fields are checked
    if not isinstance(manifest, dict) or (_CHECKSUM not in manifest and all(key in fields for key in manifest)):
        return
    if manifest.pop(_CHECKSUM, None) != digest(manifest):
        raise VerificationError(f"{file} was damaged or edited: its checksum does not match", hint=_COPY_AGAIN)

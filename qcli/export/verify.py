"""Check a checkpoint against its manifest: hashes of files, headers and values of tensors; and that it loads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qcli.models.loadable import require_loadable
from qcli.models.manifest import MANIFEST, WEIGHT_FILES, Manifest
from qcli.models.open import ModelSource, open_source
from qcli.models.quantized import QuantizedSource
from qcli.utils.errors import QcliError, UsageError, VerificationError
from qcli.utils.files import files_below, sha256
from qcli.utils.progress import Progress, silent


@dataclass(frozen=True)
class Verified:
    """A checkpoint that agrees with its manifest.

    Attributes:
        files: number of files that the manifest lists.
        bytes: their size.
        layers: number of quantized layers.
        bits_per_weight: of these layers.
        unlisted: other files in the folder, such as a README; none holds weights.
    """

    folder: str
    files: int
    bytes: int
    layers: int
    bits_per_weight: float
    unlisted: list[str]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def verify(folder: Path, progress: Progress = silent) -> Verified:
    """Recompute everything in the manifest that can be recomputed.

    Raises:
        VerificationError: names the first file or tensor that disagrees.
    """
    manifest = Manifest.read(folder)
    listed = manifest.files
    for number, (name, entry) in enumerate(listed.items()):
        progress("hash", number, len(listed), name)
        file = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise VerificationError(f"{folder / MANIFEST} lists {name}, which is no file of the folder")
        if not file.is_file():
            raise VerificationError(f"{file} is listed in the manifest but missing", hint="copy the checkpoint again")
        if file.stat().st_size != entry.bytes or sha256(file) != entry.sha256:
            raise VerificationError(f"{file} has changed: its size or hash differs from the manifest")
    progress("hash", len(listed), len(listed))
    present = (file.relative_to(folder).as_posix() for file in files_below(folder))
    unlisted = sorted(name for name in present if name not in listed and name != MANIFEST)
    weights = [name for name in unlisted if name.endswith(WEIGHT_FILES)]
    if weights:
        raise VerificationError(f"{folder / weights[0]} holds weights but is not listed in the manifest")
    source = open_source(str(folder))
    try:
        require_loadable(source)
    except UsageError as problem:
        raise VerificationError(problem.message, hint=problem.hint) from None
    _check_values(source, progress)
    layers = [layer.name for layer in manifest.layers]
    reported = [*manifest.layers, *manifest.vocabulary]
    if missing := {f"{layer.name}.weight" for layer in reported} - source.tensors().keys():
        raise VerificationError(f"{folder} has no {min(missing)} although the manifest lists its layer")
    bits = source.bits_of(layers)
    if not abs(bits - manifest.bits_per_weight) <= 1e-9:  # nor is it so if the manifest says NaN
        raise VerificationError(
            f"{folder} has {bits:.4f} bits per weight, its manifest says {manifest.bits_per_weight:.4f}"
        )
    return Verified(
        folder=str(folder),
        files=len(listed),
        bytes=sum(entry.bytes for entry in listed.values()),
        layers=len(layers),
        bits_per_weight=manifest.bits_per_weight,
        unlisted=unlisted,
    )


def _check_values(source: ModelSource, progress: Progress) -> None:
    names = list(source.tensors())
    for number, name in enumerate(names):
        progress("check", number, len(names))
        layer = name.removesuffix(".weight")
        try:
            if isinstance(source, QuantizedSource) and layer in source.packed:
                source.read_quantized(layer).check()
            else:
                source.read([name])
        except QcliError as problem:
            raise VerificationError(f"{source.path}: {layer}: {problem.message}") from None
    progress("check", len(names), len(names))

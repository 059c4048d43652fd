"""Write a checkpoint for deployment and read it back before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcli.export.model_card import model_card
from qcli.export.proof import prove
from qcli.export.readback import compare
from qcli.export.result import PackPlan, PackResult
from qcli.export.target import ExportTarget, load_target, require_engines
from qcli.models.card import CARD
from qcli.models.loadable import loading_code
from qcli.models.manifest import MANIFEST, RECIPE, Manifest, require_own_checkpoint
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.recipe.record import portable_manifest, recipe_yaml
from qcli.utils import run_folder
from qcli.utils.errors import UsageError
from qcli.utils.files import write_bytes
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import Replacing, RunFolder
from qcli.utils.trust import NOTHING, Trust


def pack(
    run: Path,
    out: Path,
    *,
    format: str,
    shard_size: int,
    requantize: str | None = None,
    allow_refused: bool = False,
    evaluation: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    trust: Trust = NOTHING,
    force: bool = False,
) -> PackResult:
    """Write the checkpoint in `run` to `out`, in the layout of an export target or with other file sizes.

    Before `out` appears, it is opened as any model is, every decoded weight is compared bit for bit, and the logits
    of one batch are compared.

    Args:
        run: a folder that `qcli quantize` or `qcli distill` wrote.
        format: name of the export target.
        shard_size: largest size of a weight file, in bytes of tensors.
        requantize: the type that layers are rounded to if the layout cannot store them exactly; None: refuse them.
        allow_refused: write also what an engine that the layout is meant for does not load.
        evaluation: `Evaluation.to_json` of `run`, for the model card.
        trust: whether Python files of the checkpoint may run; then they are copied, too.
        force: replace a checkpoint of qcli's that is at `out`, once the new one is complete.

    Raises:
        UsageError: `run` is not a qcli checkpoint, or there is no such target.
        UnsupportedError: the layout cannot store something in `run`, or an engine would refuse it.
        StateError: `out` exists.
        VerificationError: weights of `run` have changed since they were written, or what was written does not read
            back, or computes something else.
        QcliError: something cannot be written; see `os_problem`.
    """
    target = load_target(format, requantize)
    source = _open_native(run, trust)
    existing = Replacing(require_own_checkpoint, force, (str(run),))
    run_folder.refuse_existing(out, existing)
    run_folder.refuse_interrupted(out)
    _require_packable(source, target, allow_refused)
    Manifest.read(run).require_weights(run)
    with RunFolder(out, {"pack": format}, "never", existing) as folder:
        try:
            result = _write(source, target, folder.result(), out, shard_size, evaluation, progress, trust)
            folder.publish()
        except BaseException:
            folder.remove()
            raise
    return result


def plan_pack(
    run: Path, *, format: str, requantize: str | None = None, allow_refused: bool = False, trust: Trust = NOTHING
) -> PackPlan:
    """Check what `pack` checks before it writes: arguments and errors as there, except those about `out`."""
    target = load_target(format, requantize)
    source = _open_native(run, trust)
    _require_packable(source, target, allow_refused)
    return PackPlan(run, target.name, len(source.quantized), len(target.rounded()), target.notes(source))


def _require_packable(source: NativeSource, target: ExportTarget, allow_refused: bool) -> None:
    source.companions()  # what cannot be copied is refused before any work
    target.check(source)
    if not allow_refused:
        require_engines(target, source)


def _open_native(run: Path, trust: Trust) -> NativeSource:
    source = open_source(str(run), trust)
    if isinstance(source, NativeSource):
        return source
    if (run / MANIFEST).exists() and (target := Manifest.read(run).packed_as):
        raise UsageError(
            f"{run} is already packed as {target}", hint="pack the folder of `qcli quantize` that it was made from"
        )
    raise UsageError(
        f"{run} is not a qcli checkpoint",
        hint="quantize the model first; `--format gguf --type Q4_K_M` has llama.cpp quantize it",
    )


def _write(
    source: NativeSource,
    target: ExportTarget,
    folder: Path,
    out: Path,
    shard_size: int,
    evaluation: Mapping[str, Any] | None,
    progress: Progress,
    trust: Trust,
) -> PackResult:
    """Fill `folder`, which will be published as `out`; the manifest is the last file."""
    target.write(source, folder, shard_size, progress)
    written = target.open(folder, trust)
    difference = compare(source, written, target, progress)
    proof = prove(source, folder, target, trust, progress)
    loading = loading_code(target.loading_of(source), source.config)
    result = PackResult(
        out=out,
        format=target.name,
        files=len(written.weight_files()),
        bits_per_weight=written.bits_of(source.quantized),
        model_bits_per_weight=written.model_bits_per_weight(),
        bytes=written.bytes(),
        rounded=len(target.rounded()),
        max_logit_difference=difference.maximum,
        kl=difference.kl,
        notes=target.notes(source),
        proof=proof,
        loading=loading,
    )
    changed: dict[str, Any] = {
        "bits_per_weight": result.bits_per_weight,
        "model_bits_per_weight": result.model_bits_per_weight,
        "bytes": result.bytes,
        "packed_as": target.name,
        "rounded": target.rounded(),
        "notes": result.notes,
    }
    manifest = Manifest.read(source.path)
    if manifest.facts and written.formats() != source.formats():  # they are of codes that the layout does not keep
        changed |= {"layers": [replace(layer, facts={}) for layer in manifest.layers], "facts": {}}
    manifest = portable_manifest(manifest.model_copy(update=changed))
    recipe = recipe_yaml(manifest)
    write_bytes(folder / RECIPE, recipe.encode())
    described = model_card(manifest, result, loading, recipe, evaluation, library=target.hub_library)
    write_bytes(folder / CARD, described.encode())
    manifest.write(folder)
    return result

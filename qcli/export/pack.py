"""Write a checkpoint for deployment, read it back, and compare before it gets its name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qcli.export.model_card import model_card
from qcli.export.target import Export
from qcli.models import manifest as checkpoint
from qcli.models.native import NativeSource
from qcli.models.open import Source, open_source
from qcli.models.stream import ModelStream
from qcli.utils import registry, run_folder
from qcli.utils.device import matmul_precision
from qcli.utils.errors import ResourceError, StateError, UsageError, VerificationError
from qcli.utils.files import write_bytes
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import RunFolder

_PROBE_TOKENS = 64
_SAME_KL = 1e-3  # norms of a gguf file are near, not equal, and bfloat16 makes steps of that; another config is far off


def pack(
    run: Path,
    out: Path,
    *,
    format: str,
    shard_size: int,
    requantize: str | None = None,
    evaluation: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write what `qcli quantize` left in `run` to `out`, in another layout or with other file sizes.

    Before `out` appears it is opened as any model is, every decoded weight is compared bit for bit, and the logits
    of one batch are compared.

    Args:
        format: a layout of `exports/`.
        shard_size: bytes of tensors in one file.
        requantize: what weights are rounded to that the layout cannot hold as they are; None: they are refused.
        evaluation: `Evaluation.to_json` of `run`, for the model card.

    Returns:
        Layout, size, number of files and of rounded layers, and the largest difference of a logit with its KL
        divergence.

    Raises:
        UsageError: `run` is not a qcli checkpoint, or the layout is unknown.
        UnsupportedError: something in `run` does not fit the layout.
        StateError: `out` exists.
        VerificationError: what was written does not read back the same, or computes something else.
        ResourceError: the disk is full.
    """
    export: Export = registry.load("qcli.export.targets", format)(requantize)
    source = open_source(str(run))
    if not isinstance(source, NativeSource):
        if (run / checkpoint.MANIFEST).exists() and (layout := checkpoint.Manifest.read(run).packed_as):
            raise UsageError(
                f"{run} is packed as {layout} already", hint="pack the folder of `qcli quantize` that it was made of"
            )
        raise UsageError(f"{run} is not a checkpoint that qcli wrote", hint="quantize the model first")
    run_folder.refuse_existing(out)
    if run_folder.has_parts(out):
        raise StateError(
            f"{run_folder.partial(out)} holds an interrupted run", hint="finish it, remove it, or choose another --out"
        )
    export.check(source)
    with RunFolder(out, {"pack": format}, "never") as folder:
        try:
            result = _write(run, source, export, folder.result(), shard_size, evaluation, progress)
            folder.publish()
        except BaseException as error:
            shutil.rmtree(folder.path, ignore_errors=True)
            if isinstance(error, ResourceError):  # whose hint is that of runs which keep their parts
                raise ResourceError(error.message, hint="free some space and pack again") from None
            raise
    return {"out": str(out), **result}


def _write(
    run: Path,
    source: NativeSource,
    export: Export,
    folder: Path,
    shard_size: int,
    evaluation: Mapping[str, Any] | None,
    progress: Progress,
) -> dict[str, Any]:
    export.write(source, folder, shard_size, progress)
    shutil.copyfile(run / checkpoint.RECIPE, folder / checkpoint.RECIPE)
    written = export.open(folder)
    difference = _compare(source, written, export, progress)
    result: dict[str, Any] = {
        "format": export.name,
        "files": len(written.weight_files()),
        "bits_per_weight": written.bits_of(source.quantized),
        "model_bits_per_weight": written.model_bits_per_weight(),
        "bytes": written.bytes(),
        "rounded": len(export.rounded()),
        **difference,
        "notes": export.notes(source),
    }
    manifest = checkpoint.Manifest.read(run)
    recipe = (folder / checkpoint.RECIPE).read_text(encoding="utf-8")
    write_bytes(folder / "README.md", model_card(manifest, result, export.loading, recipe, evaluation).encode())
    size = {key: result[key] for key in ("bits_per_weight", "model_bits_per_weight", "bytes")}
    packing = {"packed_as": export.name, "rounded": export.rounded(), "notes": result["notes"]}
    manifest.model_copy(update=size | packing).write(folder)
    return result


def _compare(source: NativeSource, written: Source, export: Export, progress: Progress) -> dict[str, float]:
    names = list(source.tensors())
    for number, name in enumerate(names):
        progress("compare", number, len(names))
        expected, found = source.read([name])[name], written.read([name])[name]
        if not _near(expected.to(found.dtype), found, export.tolerance(name, expected)):
            raise VerificationError(
                f"{name} does not read back as it was", hint="this is a bug of qcli or a failing disk"
            )
    before, after = (_logits(model, source.dtype) for model in (source, written))
    progress("compare", len(names), len(names))
    kl = float((before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean())
    if not export.rounded() and before.isfinite().all() and not kl <= _SAME_KL:
        raise VerificationError(
            f"all weights read back, but the logits differ from those of the quantized checkpoint (KL {kl:.3g})",
            hint="this is a bug of qcli",
        )
    return {"max_logit_difference": float((before - after).abs().max()), "kl": kl}


def _near(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> bool:
    if tolerance == 0:
        return torch.equal(expected, found)
    return expected.shape == found.shape and bool((expected - found).abs().max() <= tolerance)


@torch.no_grad()
def _logits(model: Source, dtype: torch.dtype) -> torch.Tensor:
    stream = ModelStream(model, device=torch.device("cpu"), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    vocabulary = stream.model.get_input_embeddings().num_embeddings
    with matmul_precision(fast=False):
        return stream.logits_of(torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=generator)).float()

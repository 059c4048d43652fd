"""Write a checkpoint for deployment, read it back, and compare before it gets its name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from qcli import checkpoint, registry, shards
from qcli.compute import matmul_precision
from qcli.errors import StateError, UsageError, VerificationError
from qcli.export import Export
from qcli.models.native import NativeSource
from qcli.models.source import Source, open_source
from qcli.models.stream import ModelStream
from qcli.progress import Progress, silent

_PROBE_TOKENS = 64


def pack(run: Path, out: Path, *, format: str, shard_size: int, progress: Progress = silent) -> dict[str, Any]:
    """Write what `qcli quantize` left in `run` to `out`, in another layout or with other file sizes.

    Before `out` appears it is opened as any model is, every decoded weight is compared bit for bit, and the logits
    of one batch are compared.

    Args:
        format: a layout of `exports/`.
        shard_size: bytes of tensors in one file.

    Returns:
        Layout, size, number of files, and the largest difference of a logit with its KL divergence.

    Raises:
        UsageError: `run` is not a qcli checkpoint, or the layout is unknown.
        StateError: `out` exists.
        VerificationError: what was written does not read back the same.
    """
    export: Export = registry.load("qcli.exports", format)()
    source = open_source(str(run))
    if not isinstance(source, NativeSource):
        raise UsageError(f"{run} is not a checkpoint that qcli wrote", hint="quantize the model first")
    if out.exists():
        raise StateError(f"{out} exists", hint="choose another --out, or remove it")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise shards.disk_problem(partial, error) from None
    try:
        export.write(source, partial, shard_size, progress)
        shards.write_json(partial / "config.json", export.config(source))
        source.copy_companions(partial)
        shutil.copyfile(run / checkpoint.RECIPE, partial / checkpoint.RECIPE)
        difference = _compare(source, open_source(str(partial)), progress)
        story = checkpoint.read_manifest(run) | {"packed_as": format}
        checkpoint.write_manifest(partial, story)
        files = sorted(partial.glob("*.safetensors"))
        result = {"out": str(out), "format": format, "files": len(files), "bytes": sum(f.stat().st_size for f in files)}
        shards.publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result | difference


def _compare(source: NativeSource, written: Source, progress: Progress) -> dict[str, float]:
    names = list(source.tensors())
    for number, name in enumerate(names):
        progress("compare", number, len(names))
        expected, found = source.read([name])[name], written.read([name])[name]
        if not torch.equal(expected.to(found.dtype), found):
            raise VerificationError(f"{name} does not read back as it was", hint="this is a bug of qcli or a failing disk")
    before, after = (_logits(model, source.dtype) for model in (source, written))
    progress("compare", len(names), len(names))
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean()
    return {"max_logit_difference": float((before - after).abs().max()), "kl": float(kl)}


@torch.no_grad()
def _logits(model: Source, dtype: torch.dtype) -> torch.Tensor:
    stream = ModelStream(model, device=torch.device("cpu"), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    vocabulary = stream.model.get_input_embeddings().num_embeddings
    with matmul_precision(fast=False):
        hidden = stream.embed(torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=generator))
        for index in range(stream.n_blocks):
            hidden = stream.run_block(stream.load_block(index), index, hidden)
        return stream.logits(hidden).float()

"""One quantization run: its folder, its calibration tokens, its blocks, its checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from qcli.models.manifest import versions
from qcli.models.open import ModelSource
from qcli.quantization.block_loop import BlockQuantizer, quantize_blocks
from qcli.quantization.block_parts import BlockParts
from qcli.quantization.calibration import run_tokens
from qcli.quantization.checkpoint import publish_checkpoint
from qcli.quantization.data_free import DataFree
from qcli.quantization.plan import make_plan
from qcli.quantization.result import Result
from qcli.quantization.sequential import Sequential
from qcli.recipe.recipe import Recipe
from qcli.utils.cache import Cache
from qcli.utils.determinism import determinism
from qcli.utils.device import has_fast_matmul, matmul_precision, resolve_device, resolve_dtype
from qcli.utils.files import content_hash, require_space
from qcli.utils.memory import peak_memory
from qcli.utils.progress import Progress
from qcli.utils.run_folder import RunFolder
from qcli.utils.stored_batches import BatchMemory
from qcli.utils.trust import NOTHING, Trust


def quantize_as_written(
    recipe: Recipe, out: str | Path, progress: Progress, cache: Cache, trust: Trust = NOTHING
) -> Result:
    """Quantize a model whose recipe leaves nothing open. See `qcli.quantization.quantize.quantize`."""
    started = time.monotonic()
    plan = make_plan(recipe, trust)
    device, dtype = resolve_device(recipe.device), resolve_dtype(recipe.dtype)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    identity = run_identity(recipe, plan.source, device, reads_text=plan.calibrated)
    with RunFolder(Path(out), identity, recipe.resume) as run:
        require_space(Path(out), 2 * plan.bytes - run.size())
        tokens, parts = run_tokens(plan, run, device, cache, progress), BlockParts(plan, run)
        progress("quantize", 0, parts.count)
        with matmul_precision(fast=False), torch.no_grad():
            quantizer: BlockQuantizer = DataFree(plan, device)
            if tokens is not None:
                memory = BatchMemory(device)
                quantizer = Sequential(
                    plan, run, tokens.ids, device, dtype, fast=fast, memory=memory, progress=progress
                )
            quantize_blocks(quantizer, parts, progress)
            del quantizer  # its activations, before the checkpoint is assembled
        parts.commit_dense()
        progress("quantize", parts.count, parts.count)
        result = Result(
            out=Path(out),
            plan=plan,
            layers=parts.layers(),
            training=parts.training(),
            tokens_sha256=None if tokens is None else tokens.sha256,
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(device),
            resumed_blocks=parts.resumed,
            dense=[name for name, method in plan.methods.items() if method is None],
        )
        publish_checkpoint(result, parts, tokens, progress)
    return result


def run_identity(
    recipe: Recipe, source: ModelSource, device: torch.device, *, reads_text: bool = True
) -> dict[str, Any]:
    """What decides the bytes of a run, as plain data.

    Args:
        reads_text: whether it is calibrated on the recipe's text.
    """
    return {
        "versions": versions(),
        "compute": {
            "device": device.type,
            "bf16": recipe.dtype == "auto" and has_fast_matmul(device),
            **determinism(device, recipe.deterministic),
        },
        "source": source.state(),
        "data": content_hash(Path(recipe.calibration.data)) if reads_text else None,
        "recipe": recipe.fingerprint_fields(),
    }

"""One quantization run: its folder, its calibration tokens, its blocks, its checkpoint."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcli.data.chats import chat_render
from qcli.data.datasets import require_first_row
from qcli.data.identity import content_of
from qcli.data.image_samples import Samples
from qcli.data.source import text_paths
from qcli.models.manifest import LayerReport, require_own_checkpoint, versions
from qcli.models.open import ModelSource
from qcli.quantization.block_loop import quantize_blocks, quantize_blocks_apart
from qcli.quantization.block_parts import BlockParts
from qcli.quantization.calibration import CalibrationTokens, run_tokens
from qcli.quantization.checkpoint import publish_checkpoint
from qcli.quantization.data_free import DataFree
from qcli.quantization.footprint import memory_hint, quantization_placement
from qcli.quantization.plan import Plan, make_plan
from qcli.quantization.result import Result
from qcli.quantization.sequential import Sequential
from qcli.quantization.vocabulary import quantize_vocabulary
from qcli.recipe.recipe import Recipe
from qcli.utils.cache import Cache
from qcli.utils.determinism import determinism
from qcli.utils.device import has_fast_matmul, local_device, matmul_precision, resolve_dtype
from qcli.utils.distributed import Processes, process_group, world_size
from qcli.utils.errors import UsageError, warn
from qcli.utils.files import require_space
from qcli.utils.memory import peak_memory
from qcli.utils.placement import limit_memory
from qcli.utils.progress import Progress
from qcli.utils.run_folder import FollowedRun, Replacing, RunFolder, RunParts, partial, require_startable
from qcli.utils.stored_batches import BatchMemory
from qcli.utils.trust import NOTHING, Trust


def replacing(recipe: Recipe, force: bool) -> Replacing:
    """Which results a quantization may replace: none that has its inputs, or what its model will be compared with."""
    baseline = recipe.eval.baseline if recipe.eval is not None else None
    reads = (recipe.model, *text_paths(recipe.calibration.data), *([baseline] if baseline is not None else []))
    return Replacing(require_own_checkpoint, force, reads)


def require_start(plan: Plan, recipe: Recipe, out: Path, *, force: bool) -> None:
    """Check, as `quantize` will beyond the plan, that the text is usable and `out` may be written; writes nothing.

    Args:
        plan: of the recipe.
        recipe: as it was given, with what `bits: auto` leaves open.

    Raises:
        UsageError: the first row of the text does not become text, such as a chat of a model without a template.
        StateError: as `RunFolder`.
    """
    require_calibration_text(plan, recipe)
    reads_text = plan.calibrated or recipe.allocation is not None

    def identity() -> dict[str, Any]:
        return run_identity(recipe, plan.source, local_device(recipe.device), reads_text=reads_text)

    require_startable(out, identity, recipe.resume, replacing(recipe, force))


def require_calibration_text(plan: Plan, recipe: Recipe) -> None:
    """Check that the text which quantization reads, if it does, becomes text; of a file, its first row.

    Args:
        plan, recipe: as for `require_start`.

    Raises:
        UsageError: it does not, such as a chat of a model without a template.
    """
    if (plan.calibrated or recipe.allocation is not None) and not plan.sees_images:
        require_first_row(recipe.calibration.data, chat_render(plan.source))


def quantize_as_written(
    recipe: Recipe,
    out: str | Path,
    progress: Progress,
    cache: Cache,
    trust: Trust = NOTHING,
    existing: Replacing | None = None,
) -> Result:
    """Quantize a model whose recipe leaves nothing open. See `qcli.quantization.quantize.quantize`.

    Args:
        existing: which results at `out` may be replaced; None: none.
    """
    started = time.monotonic()
    progress("reading the model", 0, 0)
    plan = make_plan(recipe, trust)
    device, dtype = local_device(recipe.device), resolve_dtype(recipe.dtype)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    placement = quantization_placement(plan)
    placement.require(memory_hint(plan))
    limit_memory(device, recipe.max_memory)
    identity = run_identity(recipe, plan.source, device, reads_text=plan.calibrated)
    with process_group(device) as processes, ExitStack() as stack:
        opened: list[RunFolder] = []  # in the main process alone

        def open_run() -> tuple[CalibrationTokens | None, dict[str, Any]]:
            run = stack.enter_context(RunFolder(Path(out), identity, recipe.resume, existing))
            opened.append(run)
            if resumed := BlockParts(plan, run).resumed:
                count = len(plan.parts) - 1
                progress("quantize", resumed, count, f"resuming: {resumed} of {count} blocks done before")
            require_space(Path(out), 2 * plan.bytes - run.size())
            if plan.calibrated:
                progress("reading the text", 0, 0)
            tokens = run_tokens(plan, run, device, cache, progress)
            if tokens is not None:
                require_samples(plan, tokens.samples, processes)
            return tokens, run.finished()

        tokens, finished = processes.broadcast(open_run)
        run: RunParts = opened[0] if opened else FollowedRun(partial(Path(out)), finished)
        parts = BlockParts(plan, run)
        hessian: Tensor | None = None  # of the head's inputs
        progress("quantize", parts.resumed, parts.count, f"memory: {placement.in_words()}")
        with matmul_precision(fast=False), torch.no_grad():
            if tokens is None:
                quantize_blocks_apart(DataFree(plan, device), parts, processes, progress)
            else:
                quantizer = Sequential(
                    plan,
                    run,
                    tokens.samples,
                    device,
                    dtype,
                    fast=fast,
                    memory=BatchMemory(device, on_host=placement.on_host),
                    progress=progress,
                    processes=processes,
                )
                quantize_blocks(quantizer, parts, progress)
                if plan.reads_final_norm and not parts.outside_done:
                    hessian = quantizer.head_hessian()
                del quantizer  # its activations, before the checkpoint is assembled

        def finish() -> tuple[list[LayerReport], list[LayerReport], dict[str, dict[str, Any]]]:
            parts.commit_dense()
            if not parts.outside_done:
                with matmul_precision(fast=False), torch.no_grad():
                    parts.commit_outside(*quantize_vocabulary(plan, hessian, device, progress))
            if plan.last_block + 1 < parts.count:  # the dense blocks after it, which no loop reports
                progress("quantize", parts.count, parts.count)
            return parts.layers(), parts.vocabulary(), parts.training()

        layers, vocabulary, training = processes.broadcast(finish)
        result = Result(
            out=Path(out),
            plan=plan,
            layers=layers,
            vocabulary=vocabulary,
            training=training,
            tokens_sha256=None if tokens is None else tokens.sha256,
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(device),
            resumed_blocks=parts.resumed,
            dense=[name for name, method in plan.methods.items() if method is None],
            processes=processes.world_size,
        )
        if opened:
            publish_checkpoint(result, parts, opened[0], tokens, progress)
        processes.barrier()
    return result


def require_samples(plan: Plan, calibration: Samples, processes: Processes) -> None:
    """Refuse processes without a sample to calibrate on, and warn of those that steps of a training leave idle.

    Args:
        calibration: held-out ones included.
    """
    samples, count = len(calibration) - plan.held_out, processes.world_size
    length = calibration.shape[1] if isinstance(calibration, Tensor) else calibration.mean_length
    if samples < count:
        raise UsageError(
            f"{samples} calibration samples cannot be divided among {count} processes",
            hint="use more --samples, or fewer processes",
        )
    refinement = plan.recipe.refinement
    if refinement is None or refinement.scope != "block" or refinement.batch_tokens >= count * length:
        return
    busy = max(1, refinement.batch_tokens // length)
    if busy < count:
        warn(
            f"steps of the refinement have samples for {busy} of {count} processes; "
            f"refine.batch_tokens {count * length} is one for each"
        )


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
            "processes": world_size() if reads_text else 1,
        },
        "source": source.state(),
        "data": content_of(recipe.calibration.data) if reads_text else None,
        "recipe": recipe.fingerprint_fields(),
    }

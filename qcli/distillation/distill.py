"""Knowledge distillation: train a quantized model to predict what the model it was made from predicts.

Tables, and optionally the weights behind the codes, are trained on text that may differ from the calibration text: of
all layers together, in one process or several, or block by block. The state is saved at every evaluation on held-out
samples, and an interrupted run ends with the same bytes as one that was not.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from qcli.algorithms.training.outcome import Outcome
from qcli.data.identity import content_of, text_identity
from qcli.data.source import text_paths
from qcli.data.tokens import TokenRequest, Tokens, calibration_tokens, require_training_samples
from qcli.distillation.blockwise import distill_blocks
from qcli.distillation.checkpoint import publish_checkpoint
from qcli.distillation.job import DistillationJob
from qcli.distillation.plan import open_pair, plan_distillation
from qcli.distillation.result import DistillationResult
from qcli.distillation.training_state import STATE_VERSION
from qcli.distillation.whole_model import distill_model
from qcli.models.manifest import Manifest, require_own_checkpoint, versions
from qcli.models.open import ModelSource
from qcli.recipe.distillation import Distillation
from qcli.recipe.recipe import Recipe
from qcli.utils import run_folder
from qcli.utils.determinism import determinism, deterministic
from qcli.utils.device import has_fast_matmul, local_device, matmul_precision, resolve_dtype
from qcli.utils.distributed import process_group, world_size
from qcli.utils.environment import can_plot
from qcli.utils.memory import peak_memory
from qcli.utils.placement import limit_memory
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import Replacing, RunFolder
from qcli.utils.trust import NOTHING, Trust

_TOKENS = "tokens"
PLOT = "distill.png"


def distill(
    student: Path,
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    *,
    trust: Trust = NOTHING,
    force: bool = False,
) -> DistillationResult:
    """Train the checkpoint `student` against `recipe.model` and write the result to the folder `out`.

    Args:
        recipe: its `distill` has the options, its `distill_text` the text.
        force: replace a checkpoint of qcli's that is at `out`, once the new one is complete.

    Raises:
        UsageError, ResourceError: as `plan_distillation`, and if the text cannot be used.
        StateError: the output exists or belongs to another run.
        VerificationError: weights of the student have changed since they were written.
        UnsupportedError: as `quantize`.
    """
    progress("reading the models", 0, 0)
    memory = plan_distillation(student, recipe, trust).memory
    started, options = time.monotonic(), recipe.distill or Distillation()
    student_source, teacher_source = open_pair(student, recipe.source, trust)
    device, dtype = local_device(recipe.device), resolve_dtype(recipe.dtype)
    limit_memory(device, recipe.max_memory)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    manifest = Manifest.read(student)
    manifest.require_weights(student)
    identity = {
        "versions": versions(),
        "compute": {
            "device": device.type,
            "bf16": fast,
            "processes": world_size(),
            **determinism(device, recipe.deterministic),
        },
        "student": {name: asdict(file) for name, file in manifest.files.items()},
        "teacher": teacher_source.state(),
        "text": recipe.distill_text.model_dump(mode="json"),
        "data": content_of(recipe.distill_text.data),
        "distill": options.model_dump(mode="json"),
        "bos": recipe.bos,
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "state": STATE_VERSION,
    }
    with (
        deterministic(device, wanted=recipe.deterministic),
        process_group(device) as processes,
        ExitStack() as stack,
    ):
        runs: list[RunFolder] = []  # one, in the main process alone

        def open_run() -> Tensor:
            text = recipe.distill_text.data
            existing = Replacing(require_own_checkpoint, force, (str(student), recipe.model, *text_paths(text)))
            runs.append(stack.enter_context(RunFolder(out, identity, recipe.resume, existing)))
            return _tokens(recipe, teacher_source, runs[0], device, progress)

        tokens = processes.broadcast(open_run)
        run = runs[0] if runs else None
        job = DistillationJob(
            student=student_source,
            teacher=teacher_source,
            tokens=tokens,
            held_out=recipe.distill_text.held_out,
            options=options,
            seed=f"{recipe.seed}:distill",
            device=device,
            dtype=dtype,
            fast=fast,
            progress=progress,
            on_host=memory.on_host,
        )
        job = replace(job, progress=_with_speed(job))
        blocks: list[Outcome] = []
        with matmul_precision(fast=False), torch.no_grad():
            if options.scope == "block":
                assert run is not None
                trained, outcome, blocks = distill_blocks(job, run)
            else:
                trained, outcome = distill_model(job, run, run_folder.partial(out), processes)
        top_k = options.teacher_top_k
        result = DistillationResult(
            out=out,
            student=str(student),
            teacher=recipe.source,
            outcome=outcome,
            measure="KL" if top_k is None else f"KL over the teacher's {top_k} likeliest tokens and all others",
            blocks=blocks,
            plot=PLOT if can_plot() else None,
            bits_per_weight=student_source.bits_per_weight(),
            bytes=student_source.bytes(),
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(device),
        )
        if run is not None:
            publish_checkpoint(job, recipe, trained, result, run.report(_TOKENS), run)
        processes.barrier()
    return result


def distillation_tokens(
    recipe: Recipe, teacher: ModelSource, device: torch.device | str = "cpu", progress: Progress = silent
) -> Tokens:
    """The training and held-out samples of the recipe's distillation.

    Raises:
        UsageError: as `calibration_tokens` does, or no sample is left to train on.
    """
    text = recipe.distill_text
    request = TokenRequest(text.data, text.samples, text.seq_len, recipe.seed, text.held_out, bos=recipe.bos)
    tokens = calibration_tokens(request, teacher, device=device, progress=progress)
    require_training_samples(tokens, text.held_out)
    return tokens


def _tokens(recipe: Recipe, teacher: ModelSource, run: RunFolder, device: torch.device, progress: Progress) -> Tensor:
    """int64 `[samples, length]`; the last ones are held out."""
    if (file := run.done(_TOKENS)) is None:
        tokens = distillation_tokens(recipe, teacher, device, progress)
        run.commit(
            _TOKENS,
            {"ids": tokens.ids},
            {"text_identity": text_identity(tokens.data, calibration=True), "bos": tokens.bos},
        )
        file = run.file(_TOKENS)
    return load_file(file)["ids"]


def _with_speed(job: DistillationJob) -> Progress:
    """The job's progress, with tokens per second since a training began or was resumed."""
    step_tokens = job.options.accumulate * job.pass_samples * job.tokens.shape[1]
    first_step, started = 0, 0.0

    def report(stage: str, done: int, total: int, detail: str = "") -> None:
        nonlocal first_step, started
        if stage == "train":
            if not detail:
                first_step, started = done, time.monotonic()
            else:
                rate = (done - first_step) * step_tokens / max(1e-9, time.monotonic() - started)
                detail = f"{detail}, {rate:,.0f} tokens/s"
        job.progress(stage, done, total, detail)

    return report

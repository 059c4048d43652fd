"""Tune a quantized model as a whole against the model it was made from.

Codes and tables are trained (`trained.py`) for the teacher's predictions, on text that quantization need not have
seen: those of all layers together, in one process or several, or block by block. The state of the training is kept at
every judgement of held-out text, and a run that was killed ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qcli.algorithms.training.outcome import Outcome
from qcli.data.identity import text_identity
from qcli.data.tokens import TokenRequest, Tokens, calibration_tokens, require_training_samples
from qcli.distillation.blockwise import distill_blocks
from qcli.distillation.plan import intend, pair
from qcli.distillation.plots import can_plot, plot_training
from qcli.distillation.teacher import Lesson
from qcli.distillation.whole_model import distill_model
from qcli.models import manifest as checkpoint
from qcli.models.manifest import DistillationReport, Manifest
from qcli.models.native import NativeSource
from qcli.models.open import Source
from qcli.recipe.distillation import Distillation
from qcli.recipe.dump import to_yaml
from qcli.recipe.recipe import Recipe
from qcli.utils import run_folder, shards
from qcli.utils.device import has_fast_matmul, local_device, matmul_precision, resolve_dtype
from qcli.utils.distributed import process_group, world_size
from qcli.utils.files import write_bytes, write_json
from qcli.utils.memory import peak_memory
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import RunFolder
from qcli.utils.safetensors import read_header

_TOKENS, _WEIGHTS = "tokens", "weights"
PLOT = "distill.png"


@dataclass(frozen=True)
class Distilled:
    """A finished checkpoint.

    Attributes:
        outcome: held-out loss in nats per token, before and after.
        measure: what loss that is.
        blocks: where blocks were trained one by one, how each went.
        plot: the file with the curve; None: matplotlib is not installed.
    """

    out: Path
    student: str
    teacher: str
    outcome: Outcome
    measure: str
    blocks: list[Outcome]
    plot: str | None
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"out": str(self.out)}


def distill(student: Path, recipe: Recipe, out: Path, progress: Progress = silent) -> Distilled:
    """Train the checkpoint `student` against `recipe.model` and write the result to the folder `out`.

    Args:
        recipe: its `distill` says how, its `distill_text` on what.

    Raises:
        UsageError, ResourceError: as `intend`, and where the data is not usable.
        StateError: the output exists or belongs to another run.
    """
    intend(student, recipe)
    started, options = time.monotonic(), recipe.distill or Distillation()
    pupil, master = pair(student, recipe.model)
    device, dtype = local_device(recipe.device), resolve_dtype(recipe.dtype)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    identity = {
        "versions": checkpoint.versions(),
        "compute": {"device": device.type, "bf16": fast, "processes": world_size()},
        "student": {name: asdict(file) for name, file in Manifest.read(student).files.items()},
        "teacher": master.fingerprint(),
        "text": recipe.distill_text.model_dump(mode="json"),
        "distill": options.model_dump(mode="json"),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    with process_group(device) as processes, ExitStack() as opened:

        def prepare() -> Tensor:
            run = opened.enter_context(RunFolder(out, identity, recipe.resume))
            runs.append(run)
            return _tokens(recipe, master, run, device, progress)

        runs: list[RunFolder] = []  # in the first process
        tokens = processes.broadcast(prepare)
        run = runs[0] if runs else None
        lesson = Lesson(
            pupil=pupil,
            master=master,
            tokens=tokens,
            held_out=recipe.distill_text.held_out,
            options=options,
            seed=f"{recipe.seed}:distill",
            device=device,
            dtype=dtype,
            fast=fast,
            progress=progress,
        )
        lesson = replace(lesson, progress=_with_speed(lesson))
        blocks: list[Outcome] = []
        with matmul_precision(fast=False), torch.no_grad():
            if options.scope == "block":
                assert run is not None
                layers, outcome, blocks = distill_blocks(lesson, run)
            else:
                layers, outcome = distill_model(lesson, run, run_folder.partial(out), processes)
        top = options.teacher_top_k
        result = Distilled(
            out=out,
            student=str(student),
            teacher=recipe.model,
            outcome=outcome,
            measure="KL" if top is None else f"KL over the teacher's {top} likeliest tokens and all others",
            blocks=blocks,
            plot=PLOT if can_plot() else None,
            bits_per_weight=pupil.bits_per_weight(),
            bytes=pupil.bytes(),
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(device),
        )
        if run is not None:
            run.commit(_WEIGHTS, layers)
            _write(student, pupil, recipe, options, tokens, result, run)
        processes.barrier()
    return result


def _with_speed(lesson: Lesson) -> Progress:
    """Progress that tells tokens per second of the steps since a training's start."""
    step_tokens = lesson.options.accumulate * lesson.pass_samples * lesson.tokens.shape[1]
    progress, begun = lesson.progress, (0.0, 0)

    def told(stage: str, done: int, total: int, detail: str = "") -> None:
        nonlocal begun
        if stage == "train":
            if not detail:
                begun = time.monotonic(), done
            else:
                rate = (done - begun[1]) * step_tokens / max(1e-9, time.monotonic() - begun[0])
                detail = f"{detail}, {rate:,.0f} tokens/s"
        progress(stage, done, total, detail)

    return told


def lesson_tokens(
    recipe: Recipe, teacher: Source, device: torch.device | str = "cpu", progress: Progress = silent
) -> Tokens:
    """What the recipe's distillation trains on.

    Raises:
        UsageError: as `calibration_tokens` does, or nothing is left to train on.
    """
    text = recipe.distill_text
    request = TokenRequest(text.data, text.samples, text.seq_len, recipe.seed, text.held_out)
    tokens = calibration_tokens(request, teacher, device=device, progress=progress)
    require_training_samples(tokens, text.held_out)
    return tokens


def _tokens(recipe: Recipe, teacher: Source, run: RunFolder, device: torch.device, progress: Progress) -> Tensor:
    """int64 `[samples, length]`; the last ones are held out."""
    if (file := run.done(_TOKENS)) is None:
        identity = text_identity(recipe.distill_text.data)
        run.commit(_TOKENS, {"ids": lesson_tokens(recipe, teacher, device, progress).ids}, identity)
        file = run.file(_TOKENS)
    return load_file(file)["ids"]


def _write(
    student: Path,
    pupil: NativeSource,
    recipe: Recipe,
    options: Distillation,
    tokens: Tensor,
    result: Distilled,
    run: RunFolder,
) -> None:
    """The student's checkpoint with other codes and tables, manifest last."""
    folder, trained = run.result(), read_header(run.file(_WEIGHTS))
    shards.join(
        [{name: trained.get(name, extent)} for name, extent in pupil.extents.items()], folder, shards.SHARD_SIZE
    )
    write_json(folder / "config.json", pupil.config)
    pupil.copy_companions(folder)
    if result.plot is not None:
        plot_training(result.outcome, result.measure, result.blocks, folder / result.plot)
    before = Manifest.read(student)
    made_by = before.recipe | {"distill": options.model_dump(mode="json", exclude_none=True)}
    write_bytes(folder / checkpoint.RECIPE, to_yaml(made_by, None).encode())
    report = DistillationReport(
        teacher=recipe.model,
        text=recipe.distill_text.model_dump(mode="json"),
        text_identity=run.report(_TOKENS),
        tokens_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        seed=recipe.seed,
        measure=result.measure,
        outcome=result.outcome,
        blocks=result.blocks,
        seconds=result.seconds,
        peak_memory=result.peak_memory,
    )
    before.model_copy(update={"recipe": made_by, "distilled": [*before.distilled, report]}).write(folder)
    run.publish()

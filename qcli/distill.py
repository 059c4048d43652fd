"""Tune a quantized model as a whole against the model it was made from.

Codes and tables of all layers are trained together (`trained.py`) for the teacher's predictions, on text that
quantization need not have seen. The state of the training is kept at every judgement of held-out text, and a run that
was killed ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qcli import checkpoint, shards
from qcli.compute import has_fast_matmul, matmul_precision, resolve_device, resolve_dtype
from qcli.data import calibration_tokens
from qcli.distillation import Distillation
from qcli.errors import UsageError
from qcli.memory import peak_memory
from qcli.models.headers import read_header
from qcli.models.native import NativeSource
from qcli.models.objectives import DistillationObjective
from qcli.models.source import Source, open_source
from qcli.models.stream import ModelStream
from qcli.plan import SHARD_SIZE
from qcli.progress import Progress, silent
from qcli.recipe import Recipe
from qcli.recipe_text import to_yaml
from qcli.run_folder import RunFolder
from qcli.trained import TrainedWeight
from qcli.training import Outcome, Schedule, train

_TOKENS, _WEIGHTS = "tokens", "weights"


@dataclass(frozen=True)
class Distilled:
    """A finished checkpoint.

    Attributes:
        outcome: held-out KL in nats per token, before and after.
    """

    out: Path
    student: str
    teacher: str
    outcome: Outcome
    bits_per_weight: float
    bytes: int
    seconds: float
    peak_memory: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"out": str(self.out)}


def distill(student: Path, recipe: Recipe, progress: Progress = silent) -> Distilled:
    """Train the checkpoint `student` against `recipe.model` and write the result to `recipe.out`.

    Args:
        recipe: its `distill` says how, its `calibration` on what text.

    Raises:
        UsageError: no qcli checkpoint, another architecture than the teacher's, or the data is not usable.
        StateError: the output exists or belongs to another run.
    """
    assert recipe.out is not None
    if recipe.calibration.samples <= recipe.calibration.held_out:
        raise UsageError(
            f"calibration.samples: {recipe.calibration.held_out} samples are held out and none is left to train on",
            hint="use more --samples",
        )
    started, options = time.monotonic(), recipe.distill or Distillation()
    pupil, master = _pair(student, recipe.model)
    device, dtype = resolve_device(recipe.device), resolve_dtype(recipe.dtype)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    identity = {
        "versions": checkpoint.versions(),
        "compute": {"device": device.type, "bf16": fast},
        "student": checkpoint.read_manifest(student)["files"],
        "teacher": master.fingerprint(),
        "calibration": recipe.calibration.model_dump(mode="json"),
        "distill": options.model_dump(mode="json"),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    with RunFolder(Path(recipe.out), identity, recipe.resume) as run:
        tokens = _tokens(recipe, master, run, device, progress)
        with matmul_precision(fast=False), torch.no_grad():
            layers, outcome = _train(pupil, master, tokens, recipe, options, run, device, dtype, fast, progress)
        run.commit(_WEIGHTS, {name: tensor for name, weight in layers.items() for name, tensor in weight.items()})
        result = Distilled(
            out=Path(recipe.out),
            student=str(student),
            teacher=recipe.model,
            outcome=outcome,
            bits_per_weight=pupil.bits_per_weight(),
            bytes=pupil.bytes(),
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(device),
        )
        _write(student, pupil, recipe, options, tokens, result, run)
    return result


def _pair(student: Path, teacher: str) -> tuple[NativeSource, Source]:
    pupil, master = open_source(str(student)), open_source(teacher)
    if not isinstance(pupil, NativeSource):
        raise UsageError(f"{student} is not a checkpoint that qcli wrote", hint="quantize the model first")
    ours, theirs = ([(linear.name, linear.shape) for linear in source.linears()] for source in (pupil, master))
    if ours != theirs:
        raise UsageError(
            f"{teacher} has other layers than {student}, whose teacher it cannot be",
            hint=f"the checkpoint was made from {checkpoint.read_manifest(student)['source']['model']}",
        )
    return pupil, master


def _tokens(recipe: Recipe, teacher: Source, run: RunFolder, device: torch.device, progress: Progress) -> Tensor:
    """int64 `[samples, length]`; the last ones are held out."""
    if (file := run.done(_TOKENS)) is None:
        wanted = recipe.calibration
        found = calibration_tokens(
            wanted.data,
            teacher,
            samples=wanted.samples,
            seq_len=wanted.seq_len,
            seed=recipe.seed,
            device=device,
            progress=progress,
        )
        run.commit(_TOKENS, {"ids": found.ids})
        file = run.file(_TOKENS)
    return load_file(file)["ids"]


def _train(
    pupil: NativeSource,
    master: Source,
    tokens: Tensor,
    recipe: Recipe,
    options: Distillation,
    run: RunFolder,
    device: torch.device,
    dtype: torch.dtype,
    fast: bool,
    progress: Progress,
) -> tuple[dict[str, dict[str, Tensor]], Outcome]:
    """Stored tensors of every quantized layer, by layer, and how the training went."""
    student, teacher = (ModelStream(source, device=device, dtype=dtype) for source in (pupil, master))
    prefix = f"{student.family.blocks}."
    layers: dict[str, TrainedWeight] = {}
    for name in pupil.packed:
        weight = pupil.read_quantized(name).to(device)
        layers[name.removeprefix(prefix)] = TrainedWeight(weight, weight.dense(), options.train)
    last = len(tokens) - recipe.calibration.held_out
    objective = DistillationObjective(
        student,
        [student.load_block(index) for index in range(student.n_blocks)],
        teacher,
        [teacher.load_block(index) for index in range(teacher.n_blocks)],
        tokens[:last],
        tokens[last:],
        options,
        seed=f"{recipe.seed}:distill",
        fast=fast,
    )
    tables = [table for layer in layers.values() for table in layer.relative.values()]
    latents = [layer.latent for layer in layers.values() if layer.latent.requires_grad]
    groups = [{"params": tables, "lr": options.tables_lr}, {"params": latents, "lr": options.weights_lr}]
    outcome = train(
        [group for group in groups if group["params"]],
        lambda final: {path: layer.dense(final=final) for path, layer in layers.items()},
        objective,
        Schedule(
            options.steps,
            warmup=options.warmup,
            judgements=options.judgements,
            accumulate=options.accumulate,
            clip=options.clip,
        ),
        progress=progress,
        keeper=_Kept(run),
    )
    stored = {}
    for path, layer in layers.items():
        weight = (layer.weight() if outcome.best_step else layer.given).to("cpu")
        weight.check()
        stored[prefix + path] = checkpoint.stored_tensors(prefix + path, weight)
    return stored, outcome


class _Kept:
    """The state of a training as parts of the run, in turns, so that one is whole at any moment."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        parts = [part for part in ("state-0", "state-1") if self.run.done(part) is not None]
        if not parts:
            return None
        newest = max(parts, key=lambda part: int(self.run.report(part)["steps"]))
        return load_file(self.run.file(newest)), dict(self.run.report(newest))

    def save(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        turn = (len(numbers["curve"]) - 1) % 2
        self.run.commit(f"state-{turn}", {name: tensor.cpu() for name, tensor in tensors.items()}, numbers)


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
    shards.join([{name: trained.get(name, extent)} for name, extent in pupil.extents.items()], folder, SHARD_SIZE)
    shards.write_json(folder / "config.json", pupil.config)
    pupil.copy_companions(folder)
    before = checkpoint.read_manifest(student)
    made_by = before["recipe"] | {"distill": options.model_dump(mode="json", exclude_none=True)}
    shards.write_bytes(folder / checkpoint.RECIPE, to_yaml(made_by, None).encode())
    distilled = {
        "teacher": recipe.model,
        "calibration": recipe.calibration.model_dump(mode="json"),
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "seed": recipe.seed,
        "outcome": asdict(result.outcome),
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
    }
    checkpoint.write_manifest(folder, before | {"recipe": made_by, "distilled": distilled})
    run.publish()

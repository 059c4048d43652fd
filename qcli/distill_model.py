"""Distillation of all blocks at once: parameters, optimizer and teacher in memory, or sharded over processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qcli.checkpoint import stored_tensors
from qcli.errors import ResourceError, UsageError
from qcli.memory import free_memory
from qcli.models.student import Student, StudentBlock, Teacher
from qcli.processes import Processes
from qcli.run_folder import RunFolder
from qcli.teaching import Lesson, Present, Remembered, Teaches, Teaching, remember
from qcli.trained import TrainedWeight, parameter_groups
from qcli.training import Outcome, optimize

_TEACHER = "teacher"
_BYTES = {"weights": 24, "tables": 1}  # a weight's start, step, latent, best latent and two moments, float32; its code
Stored = dict[str, Tensor]


def distill_model(lesson: Lesson, run: RunFolder | None, folder: Path, processes: Processes) -> tuple[Stored, Outcome]:
    """Train all quantized layers together.

    Args:
        run: where the first process keeps the state; `folder` is its path, which all processes see.

    Returns:
        Stored tensors of every quantized layer, in the first process, and how the training went.

    Raises:
        UsageError: options that this model or these processes cannot follow.
        ResourceError: model, teacher and optimizer do not fit in memory.
    """
    options = lesson.options
    if options.accumulate % processes.size:
        raise UsageError(
            f"distill.accumulate: {options.accumulate} passes of a step cannot be shared by {processes.size} processes",
            hint="use a multiple: results are those of one process then",
        )
    vocabulary = lesson.teacher.config.get_text_config().vocab_size
    if options.teacher_top_k is not None and options.teacher_top_k >= vocabulary:
        raise UsageError(f"distill.teacher_top_k: {options.teacher_top_k} is not below the vocabulary of {vocabulary}")
    _check_memory(lesson, processes)
    wanted = _teaches(lesson, run, processes)
    student = _student(lesson, processes)
    teaching = Teaching(lesson, student, wanted, processes)
    layers = [layer for block in student.blocks for layer in block.layers.values()]
    outcome = optimize(
        parameter_groups(layers, tables_lr=options.tables_lr, weights_lr=options.weights_lr),
        teaching.backward,
        teaching.held_out,
        lesson.schedule,
        lesson.progress,
        _Kept(run, folder, processes),
    )
    return _stored(student, outcome, processes), outcome


def student_block(lesson: Lesson, index: int, *, checkpointing: bool) -> StudentBlock:
    """A block whose quantized layers are trained."""
    stream = lesson.student
    prefix = f"{stream.family.blocks}.{index}."
    layers = {
        name.removeprefix(prefix): TrainedWeight(
            lesson.pupil.read_quantized(name).to(stream.device), None, lesson.options.train
        )
        for name in lesson.pupil.packed
        if name.startswith(prefix)
    }
    return StudentBlock(stream, index, layers, checkpointing=checkpointing, fast=lesson.fast)


def stored_layers(block: StudentBlock, outcome: Outcome) -> Stored:
    """The stored tensors of a block's layers: as given, where training found nothing better."""
    found: Stored = {}
    for path, layer in block.layers.items():
        name = f"{block.stream.family.blocks}.{block.index}.{path}"
        weight = (layer.weight() if outcome.best_step else layer.given).to("cpu")
        weight.check()
        found |= stored_tensors(name, weight)
    return found


def _student(lesson: Lesson, processes: Processes) -> Student:
    blocks, whole = [], []
    for index in range(lesson.student.n_blocks):
        block = student_block(lesson, index, checkpointing=lesson.options.checkpointing)
        whole += list(block.block.parameters())
        processes.shard(block, whole=block.block.parameters())
        blocks.append(block)
    student = Student(lesson.student, blocks, fast=lesson.fast)
    processes.shard(student, whole)
    return student


def _teaches(lesson: Lesson, run: RunFolder | None, processes: Processes) -> Teaches:
    top, stream = lesson.options.teacher_top_k, lesson.teacher
    known = top is not None and processes.agreed(lambda: run is not None and run.done(_TEACHER) is not None)
    if not known:
        blocks = []
        for index in range(stream.n_blocks):
            blocks.append(stream.load_block(index))
            processes.shard(blocks[-1])
        teacher = Teacher(stream, blocks, fast=lesson.fast)
        if top is None:
            return Present(teacher, lesson.tokens)
        found = remember(teacher, lesson.tokens, top, lesson.pass_samples, lesson.progress)
        if run is not None:
            run.commit(_TEACHER, found)
    return Remembered(processes.agreed(lambda: load_file(run.file(_TEACHER)) if run is not None else {}), stream.device)


def _check_memory(lesson: Lesson, processes: Processes) -> None:
    n_weights = sum(rows * columns for rows, columns in (packed.shape for packed in lesson.pupil.packed.values()))
    each = max(_BYTES[what] for what in lesson.options.train) + lesson.teacher.dtype.itemsize
    needed, free = n_weights * each // processes.size, free_memory(lesson.teacher.device)
    if free is not None and needed > free:
        raise ResourceError(
            f"distilling the whole model needs at least {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            hint="train: [tables] needs less; --set distill.scope=block needs one block at a time",
        )


def _stored(student: Student, outcome: Outcome, processes: Processes) -> Stored:
    found: Stored = {}
    for block in student.blocks:
        with processes.whole(block):
            if processes.first:
                found |= stored_layers(block, outcome)
    return found


class _Kept:
    """The state of a training as parts of the run, in turns, so that one is whole at any moment."""

    def __init__(self, run: RunFolder | None, folder: Path, processes: Processes) -> None:
        self.run, self.folder, self.processes = run, folder, processes

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        newest = self.processes.agreed(self._newest)
        if newest is None:
            return None
        part, numbers = newest
        if self.processes.size > 1:
            self.processes.load(tensors, self.folder / part)
        else:
            assert self.run is not None
            for name, value in load_file(self.run.file(part)).items():
                tensors[name].copy_(value)
        return numbers

    def save(self, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        part = f"state-{(len(numbers['curve']) - 1) % 2}"
        alone = self.processes.size == 1
        if not alone:
            self.processes.save(tensors, self.folder / part)
        if self.run is not None:
            self.run.commit(part, {name: tensor.cpu() for name, tensor in tensors.items()} if alone else {}, numbers)

    def _newest(self) -> tuple[str, dict[str, Any]] | None:
        run = self.run
        assert run is not None
        done = [part for part in ("state-0", "state-1") if run.done(part) is not None]
        newest = max(done, key=lambda part: int(run.report(part)["steps"]), default=None)
        return None if newest is None else (newest, dict(run.report(newest)))

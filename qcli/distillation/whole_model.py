"""Distillation of all blocks at once: parameters, optimizer and teacher in memory, or sharded over processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qcli.algorithms.training.loop import optimize
from qcli.algorithms.training.outcome import Outcome
from qcli.algorithms.training.trainable_weight import TrainedWeight, parameter_groups
from qcli.distillation.student import Student, StudentBlock, Teacher
from qcli.distillation.teacher import Lesson, Present, Remembered, Teaches, Teaching, remember
from qcli.models.quantized import LayerStorage, stored_tensors
from qcli.models.stream import ModelStream
from qcli.recipe.distillation import Distillation
from qcli.utils.distributed import Processes
from qcli.utils.files import sha256
from qcli.utils.run_folder import RunFolder, part_file

_TEACHER, _FILES = "teacher", "files"
_CODE, _TRAINED = 1, 28  # bytes of a weight: its code; start, step, latent, best, gradient, two moments in float32
Stored = dict[str, Tensor]


def distill_model(lesson: Lesson, run: RunFolder | None, folder: Path, processes: Processes) -> tuple[Stored, Outcome]:
    """Train all quantized layers together.

    Args:
        run: where the first process keeps the state; `folder` is its path, which all processes see.

    Returns:
        Stored tensors of every quantized layer, in the first process, and how the training went.
    """
    options = lesson.options
    wanted = _teaches(lesson, run, folder, processes)
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


def student_block(lesson: Lesson, stream: ModelStream, index: int) -> StudentBlock:
    """A block of the student, whose quantized layers are trained."""
    prefix = f"{stream.family.blocks}.{index}."
    layers = {
        name.removeprefix(prefix): TrainedWeight(
            lesson.pupil.read_quantized(name).to(lesson.device), None, lesson.options.train
        )
        for name in lesson.pupil.quantized
        if name.startswith(prefix)
    }
    return StudentBlock(stream, index, layers, checkpointing=lesson.options.checkpointing, fast=lesson.fast)


def stored_layers(block: StudentBlock, outcome: Outcome) -> Stored:
    """The stored tensors of a block's layers: as given, where training found nothing better."""
    found: Stored = {}
    for path, layer in block.layers.items():
        name = f"{block.stream.family.blocks}.{block.index}.{path}"
        weight = (layer.weight() if outcome.best_step else layer.given).to("cpu")
        weight.check()
        found |= stored_tensors(name, weight)
    return found


def needed_memory(layers: Mapping[str, LayerStorage], options: Distillation, teacher_bytes: int, processes: int) -> int:
    """Bytes that `distill_model` takes in each process besides activations, at least.

    Args:
        layers: the student's quantized layers.
        teacher_bytes: of one weight.
    """
    n_weights = sum(rows * columns for rows, columns in (layer.shape for layer in layers.values()))
    teacher = n_weights * teacher_bytes // processes
    student = n_weights * (_CODE + (_TRAINED // processes if "weights" in options.train else 0))
    return teacher + student if options.teacher_top_k is None else max(teacher, student)


def _student(lesson: Lesson, processes: Processes) -> Student:
    stream = lesson.stream(lesson.pupil)
    blocks, whole = [], []
    for index in range(stream.n_blocks):
        block = student_block(lesson, stream, index)
        whole += list(block.block.parameters())
        processes.shard(block, replicated=block.block.parameters())
        blocks.append(block)
    student = Student(stream, blocks, fast=lesson.fast)
    processes.shard(student, whole)
    return student


def _teaches(lesson: Lesson, run: RunFolder | None, folder: Path, processes: Processes) -> Teaches:
    top = lesson.options.teacher_top_k
    if top is None:
        return Present(_teacher(lesson, processes), lesson.tokens)
    if not processes.broadcast(lambda: run is not None and run.done(_TEACHER) is not None):
        found = remember(_teacher(lesson, processes), lesson.tokens, top, lesson.pass_samples, lesson.progress)
        if run is not None:
            run.commit(_TEACHER, found)
        processes.barrier()
    return Remembered(load_file(part_file(folder, _TEACHER)), lesson.device)


def _teacher(lesson: Lesson, processes: Processes) -> Teacher:
    stream, blocks = lesson.stream(lesson.master), []
    for index in range(stream.n_blocks):
        blocks.append(stream.load_block(index))
        processes.shard(blocks[-1])
    return Teacher(stream, blocks, fast=lesson.fast)


def _stored(student: Student, outcome: Outcome, processes: Processes) -> Stored:
    found: Stored = {}
    for block in student.blocks:
        with processes.unsharded(block):
            if processes.is_main:
                found |= stored_layers(block, outcome)
    return found


class _Kept:
    """The state of a training as parts of the run, in turns, so that one is whole at any moment."""

    def __init__(self, run: RunFolder | None, folder: Path, processes: Processes) -> None:
        self.run, self.folder, self.processes = run, folder, processes

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
        newest = self.processes.broadcast(self._newest)
        if newest is None:
            return None
        part, numbers = newest
        numbers.pop(_FILES, None)
        if self.processes.world_size > 1:
            self.processes.load(tensors, self.folder / part)
        else:
            assert self.run is not None
            for name, value in load_file(self.run.file(part)).items():
                tensors[name].copy_(value)
        return numbers

    def save(self, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
        part = f"state-{(len(numbers['curve']) - 1) % 2}"
        if self.processes.world_size == 1:
            assert self.run is not None
            self.run.commit(part, {name: tensor.cpu() for name, tensor in tensors.items()}, numbers)
            return
        self.processes.save(tensors, self.folder / part)
        if self.run is not None:
            self.run.commit(part, {}, numbers | {_FILES: _hashes(self.folder / part)})

    def _newest(self) -> tuple[str, dict[str, Any]] | None:
        run = self.run
        assert run is not None
        done = [part for part in ("state-0", "state-1") if run.done(part) is not None and self._whole(part)]
        newest = max(done, key=lambda part: int(run.report(part)["steps"]), default=None)
        return None if newest is None else (newest, {**run.report(newest)})

    def _whole(self, part: str) -> bool:
        """Whether what several processes wrote is still there."""
        assert self.run is not None
        return self.processes.world_size == 1 or _hashes(self.folder / part) == self.run.report(part)[_FILES]


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*"))}

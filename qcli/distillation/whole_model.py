"""Distillation of all blocks at once: parameters, optimizer and teacher in memory, or sharded over processes."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from qcli.algorithms.training.loop import optimize
from qcli.algorithms.training.outcome import Outcome
from qcli.algorithms.training.trainable_weight import parameter_groups
from qcli.distillation.job import DistillationJob
from qcli.distillation.loss import DistillationLoss
from qcli.distillation.student import StoredTensors, Student, load_student_block
from qcli.distillation.teacher import CachedTeacher, LiveTeacher, Teacher, TeacherFn, cache_predictions
from qcli.distillation.training_state import TrainingState
from qcli.utils.distributed import Processes
from qcli.utils.run_folder import RunFolder, part_file

_TEACHER = "teacher"
# Bytes of a weight: its code; and in float32 latent, best latent, gradient and two Adam moments.
_CODE, _TRAINED = 1, 20


def distill_model(
    job: DistillationJob, run: RunFolder | None, folder: Path, processes: Processes
) -> tuple[StoredTensors, Outcome]:
    """Train all quantized layers together.

    Args:
        run: the run folder, open in the main process alone; keeps the state of the training.
        folder: its path, which all processes see.

    Returns:
        Stored tensors of every quantized layer, in the main process only, and how the training went.
    """
    options = job.options
    teacher = _teacher_fn(job, run, folder, processes)
    student = _student(job, processes)
    if isinstance(teacher, LiveTeacher):
        student.stream.share(teacher.teacher.stream)
    loss = DistillationLoss(job, student, teacher, processes)
    layers = [block.layers for block in student.blocks]
    biases = [bias for block in student.blocks for bias in block.biases.values()]
    outcome = optimize(
        parameter_groups(layers, biases, tables_lr=options.tables_lr, weights_lr=options.weights_lr),
        loss.backward,
        loss.held_out,
        job.schedule,
        job.progress,
        TrainingState(run, folder, processes),
    )
    return _stored(student, outcome, processes), outcome


def _student(job: DistillationJob, processes: Processes) -> Student:
    stream = job.stream(job.student)
    blocks, replicated = [], []
    for index in range(stream.n_blocks):
        block = load_student_block(job, stream, index)
        replicated += list(block.block.parameters())
        processes.shard(block, replicated=block.block.parameters())
        blocks.append(block)
    student = Student(stream, blocks, fast=job.fast)
    processes.shard(student, replicated)
    return student


def _teacher_fn(job: DistillationJob, run: RunFolder | None, folder: Path, processes: Processes) -> TeacherFn:
    top_k = job.options.teacher_top_k
    if top_k is None:
        return LiveTeacher(_teacher(job, processes), job.tokens)
    if not processes.broadcast(lambda: run is not None and run.done(_TEACHER) is not None):
        tensors = cache_predictions(_teacher(job, processes), job.tokens, top_k, job.pass_samples, job.progress)
        if run is not None:
            run.commit(_TEACHER, tensors)
        processes.barrier()
    return CachedTeacher(load_file(part_file(folder, _TEACHER)), job.device)


def _teacher(job: DistillationJob, processes: Processes) -> Teacher:
    stream, blocks = job.stream(job.teacher), []
    for index in range(stream.n_blocks):
        block = stream.load_block(index)
        stream.round_linears(block, job.linear_dtype)
        processes.shard(block)
        blocks.append(block)
    return Teacher(stream, blocks, fast=job.fast)


def _stored(student: Student, outcome: Outcome, processes: Processes) -> StoredTensors:
    tensors: StoredTensors = {}
    for block in student.blocks:
        with processes.unsharded(block):
            if processes.is_main:
                tensors |= block.stored(outcome)
    return tensors

"""Distillation one block at a time: the streams of teacher and student, and one block of each, in memory.

A block answers for the hidden states that leave it, given what the trained blocks before it really send; the last
one, with the head behind it, answers for the predictions too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcli.algorithms.training.batches import Order, rows
from qcli.algorithms.training.loop import optimize
from qcli.algorithms.training.losses import kl_divergence, token_errors, token_lengths
from qcli.algorithms.training.outcome import Outcome
from qcli.algorithms.training.trainable_weight import parameter_groups
from qcli.distillation.teacher import Lesson
from qcli.distillation.whole_model import Stored, stored_layers, student_block
from qcli.models.stream import ModelStream
from qcli.utils.device import matmul_precision
from qcli.utils.run_folder import RunFolder


def distill_blocks(lesson: Lesson, run: RunFolder) -> tuple[Stored, Outcome, list[Outcome]]:
    """Train the quantized layers of one block after another.

    Args:
        run: keeps finished blocks.

    Returns:
        Stored tensors of every quantized layer (none: the student as it was predicts better); how the whole went, by
        KL in nats a token; and how each block went, by the error of its outputs, the last one by KL.
    """
    stored: Stored = {}
    outcomes: list[Outcome] = []
    student, teacher = lesson.stream(lesson.pupil), lesson.stream(lesson.master)
    progress, fast = lesson.progress, lesson.fast
    ours, theirs = (
        [stream.embed(batch) for batch in lesson.tokens.split(lesson.pass_samples)] for stream in (student, teacher)
    )
    given = [student.embed(sample[None]) for sample in lesson.tokens[lesson.n_trained :]]
    for index in range(student.n_blocks):
        progress("blocks", index, student.n_blocks)
        _advance(teacher, teacher.load_block(index), index, theirs, fast)
        part = f"block-{index}"
        if (file := run.done(part)) is None:
            found, outcome = _train_block(lesson, student, teacher, index, ours, theirs)
            run.commit(part, found, asdict(outcome))
            file = run.file(part)
        tensors = load_file(file)
        stored |= tensors
        outcomes.append(Outcome(**run.report(part)))
        _advance(student, student.load_block(index), index, given, fast)
        _advance(student, _as_stored(lesson, student, index, tensors), index, ours, fast)
    progress("blocks", student.n_blocks, student.n_blocks)
    held = range(lesson.n_trained, len(lesson.tokens))
    wanted, trained = ([rows(hidden, [row]) for row in held] for hidden in (theirs, ours))
    before, after = (_kl(teacher, student, wanted, found, fast) for found in (given, trained))
    better = after < before
    whole = Outcome(
        before=before,
        after=min(before, after),
        best_step=sum(outcome.best_step for outcome in outcomes) if better else 0,
        steps=sum(outcome.steps for outcome in outcomes),
        stopped=next((outcome.stopped for outcome in outcomes if outcome.stopped), None),
    )
    return stored if better else {}, whole, outcomes


def _train_block(
    lesson: Lesson, student: ModelStream, teacher: ModelStream, index: int, ours: list[Tensor], theirs: list[Tensor]
) -> tuple[Stored, Outcome]:
    """Train block `index`, which `ours` enter and whose output should be `theirs`."""
    options, fast = lesson.options, lesson.fast
    block = student_block(lesson, student, index)
    last = index == student.n_blocks - 1
    median = torch.cat([token_lengths(batch).flatten() for batch in theirs]).median()
    order = Order(lesson.n_trained, f"{lesson.seed}:{index}")

    def loss(picks: list[int]) -> Tensor:
        found, wanted = block(rows(ours, picks), False), rows(theirs, picks)
        hidden = [wanted.flatten(0, 1)], [found.flatten(0, 1)]
        if last:
            return options.token_losses(_logits(teacher, wanted, fast), _logits(student, found, fast), *hidden)
        return options.hidden_losses(*hidden) if options.needs_hidden else token_errors(found, wanted, median)

    def backward(step: int) -> float:
        total = 0.0
        for part in range(options.accumulate):
            picks = order.take(step * options.accumulate + part, lesson.pass_samples)
            mean = loss(picks).mean() / options.accumulate
            mean.backward()
            total += float(mean.detach())
        return total

    def judged() -> float:
        errors = []
        for row in range(lesson.n_trained, len(lesson.tokens)):
            found, wanted = block(rows(ours, [row]), True), rows(theirs, [row])
            if last:
                errors.append(kl_divergence(_logits(teacher, wanted, fast), _logits(student, found, fast)).mean())
            else:
                errors.append(token_errors(found, wanted, median).mean())
        return float(torch.stack(errors).mean())

    if not block.layers:  # all dense: nothing to train
        error = judged()
        return {}, Outcome(before=error, after=error, best_step=0, steps=0, curve=((0, None, error),))
    outcome = optimize(
        parameter_groups(block.layers.values(), tables_lr=options.tables_lr, weights_lr=options.weights_lr),
        backward,
        judged,
        lesson.schedule,
        lesson.progress,
    )
    return stored_layers(block, outcome), outcome


def _as_stored(lesson: Lesson, stream: ModelStream, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The student's block with the weights of finished layers."""
    block = stream.load_block(index)
    prefix = f"{stream.family.blocks}.{index}."
    for name, layer in lesson.pupil.quantized.items():
        if name.startswith(prefix):
            weight = layer.restore(name, tensors).to(stream.device)
            stream.set_weight(block.get_submodule(name.removeprefix(prefix)), weight.dense())
    return block


def _logits(stream: ModelStream, hidden: Tensor, fast: bool) -> Tensor:
    with matmul_precision(fast=fast, device=stream.device):
        return stream.logits(hidden).float().flatten(0, 1)


def _kl(teacher: ModelStream, student: ModelStream, wanted: list[Tensor], found: list[Tensor], fast: bool) -> float:
    """Mean over samples of the same length; the logits of one are in memory at a time."""
    total = 0.0
    for one, other in zip(wanted, found, strict=True):
        total += float(kl_divergence(_logits(teacher, one, fast), _logits(student, other, fast)).mean())
    return total / len(wanted)


def _advance(stream: ModelStream, block: nn.Module, index: int, hidden: list[Tensor], fast: bool) -> None:
    with matmul_precision(fast=fast, device=stream.device):
        stream.advance(block, index, hidden)

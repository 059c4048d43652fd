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

from qcli.compute import matmul_precision
from qcli.distill_model import Stored, stored_layers, student_block
from qcli.losses import kl_divergence
from qcli.models.objectives import Order, token_errors
from qcli.models.stream import ModelStream
from qcli.run_folder import RunFolder
from qcli.teaching import Lesson
from qcli.trained import parameter_groups
from qcli.training import Outcome, optimize


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
    student, teacher, progress, fast = lesson.student, lesson.teacher, lesson.progress, lesson.fast
    ours, theirs = (
        [stream.embed(batch) for batch in lesson.tokens.split(lesson.pass_samples)] for stream in (student, teacher)
    )
    given = [student.embed(lesson.tokens[lesson.n_trained :])]
    for index in range(student.n_blocks):
        progress("blocks", index, student.n_blocks)
        theirs = _through(teacher, index, teacher.load_block(index), theirs, fast)
        part = f"block-{index}"
        if (file := run.done(part)) is None:
            found, outcome = _train_block(lesson, index, ours, theirs)
            run.commit(part, found, asdict(outcome))
            file = run.file(part)
        tensors = load_file(file)
        stored |= tensors
        outcomes.append(Outcome(**run.report(part)))
        given = _through(student, index, student.load_block(index), given, fast)
        ours = _through(student, index, _as_stored(lesson, index, tensors), ours, fast)
    progress("blocks", student.n_blocks, student.n_blocks)
    wanted = torch.cat(theirs)[lesson.n_trained :]
    before, after = (
        float(kl_divergence(_logits(teacher, wanted, fast), _logits(student, hidden, fast)).mean())
        for hidden in (torch.cat(given), torch.cat(ours)[lesson.n_trained :])
    )
    better = after < before
    whole = Outcome(
        before=before,
        after=min(before, after),
        best_step=sum(outcome.best_step for outcome in outcomes) if better else 0,
        steps=sum(outcome.steps for outcome in outcomes),
        stopped=next((outcome.stopped for outcome in outcomes if outcome.stopped), None),
    )
    return stored if better else {}, whole, outcomes


def _train_block(lesson: Lesson, index: int, ours: list[Tensor], theirs: list[Tensor]) -> tuple[Stored, Outcome]:
    options, student, teacher, fast = lesson.options, lesson.student, lesson.teacher, lesson.fast
    block = student_block(lesson, index, checkpointing=False)
    inputs, targets = torch.cat(ours), torch.cat(theirs)
    last = index == student.n_blocks - 1
    median = targets[: lesson.n_trained].float().norm(dim=-1).median()
    order = Order(lesson.n_trained, f"{lesson.seed}:{index}")

    def loss(rows: list[int]) -> Tensor:
        found, wanted = block(inputs[rows], False), targets[rows]
        if not last:
            if not options.needs_hidden:
                return token_errors(found, wanted, median)
            return options.hidden_losses([wanted.flatten(0, 1)], [found.flatten(0, 1)])
        answers = _logits(teacher, wanted, fast), _logits(student, found, fast)
        return options.token_losses(*answers, [wanted.flatten(0, 1)], [found.flatten(0, 1)])

    def backward(step: int) -> float:
        total = 0.0
        for part in range(options.accumulate):
            mean = loss(order.take(step * options.accumulate + part, lesson.pass_samples)).mean() / options.accumulate
            mean.backward()
            total += float(mean.detach())
        return total

    def judged() -> float:
        found = []
        for row in range(lesson.n_trained, len(inputs)):
            output, wanted = block(inputs[row : row + 1], True), targets[row : row + 1]
            if last:
                answers = _logits(teacher, wanted, fast), _logits(student, output, fast)
                found.append(kl_divergence(*answers).mean())
            else:
                found.append(token_errors(output, wanted, median).mean())
        return float(torch.stack(found).mean())

    outcome = optimize(
        parameter_groups(block.layers.values(), tables_lr=options.tables_lr, weights_lr=options.weights_lr),
        backward,
        judged,
        lesson.schedule,
        lesson.progress,
    )
    return stored_layers(block, outcome), outcome


def _as_stored(lesson: Lesson, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The student's block with the weights of finished layers."""
    stream = lesson.student
    block = stream.load_block(index)
    prefix = f"{stream.family.blocks}.{index}."
    for name, packed in lesson.pupil.packed.items():
        if name.startswith(prefix):
            weight = packed.restore(name, tensors).to(stream.device)
            stream.set_weight(block.get_submodule(name.removeprefix(prefix)), weight.dense())
    return block


def _logits(stream: ModelStream, hidden: Tensor, fast: bool) -> Tensor:
    with matmul_precision(fast=fast, device=stream.device):
        return stream.logits(hidden).float().flatten(0, 1)


def _through(stream: ModelStream, index: int, block: nn.Module, hidden: list[Tensor], fast: bool) -> list[Tensor]:
    with matmul_precision(fast=fast, device=stream.device), torch.no_grad():
        return [stream.run_block(block, index, batch) for batch in hidden]

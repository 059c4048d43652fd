"""Distillation one block at a time: in memory are one block of student and teacher each, and hidden states of both.

A block is trained to reproduce the hidden states that leave the teacher's block, from the outputs of the trained blocks
before it. The last block, with the head behind it, is trained on predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qcli.algorithms.training.batches import BatchSampler
from qcli.algorithms.training.loop import optimize
from qcli.algorithms.training.losses import kl_divergence, relative_token_error, token_norms
from qcli.algorithms.training.outcome import Outcome
from qcli.algorithms.training.trainable_weight import parameter_groups
from qcli.distillation.job import DistillationJob
from qcli.distillation.student import StoredTensors, load_student_block
from qcli.distillation.token_losses import hidden_losses, token_losses
from qcli.models.stream import ModelStream
from qcli.utils.device import matmul_precision
from qcli.utils.run_folder import RunFolder
from qcli.utils.stored_batches import BatchMemory, StoredBatches


def distill_blocks(job: DistillationJob, run: RunFolder) -> tuple[StoredTensors, Outcome, list[Outcome]]:
    """Train the quantized layers of one block after another.

    Args:
        run: keeps finished blocks.

    Returns:
        Stored tensors of every quantized layer (none if the student predicts better without training); how the whole
        training went, in KL divergence, nats per token; and how each block's went, in the relative error of its
        output, for the last block in KL.
    """
    trained: StoredTensors = {}
    outcomes: list[Outcome] = []
    student, teacher = job.stream(job.student), job.stream(job.teacher)
    student.share(teacher)
    memory = BatchMemory(job.device, on_host=job.on_host)
    student_hidden, teacher_hidden = (
        memory.store(map(stream.embed, job.tokens.split(job.pass_samples))) for stream in (student, teacher)
    )
    untrained_hidden = memory.store(map(student.embed, job.tokens[job.n_training :].split(1)))
    student.drop_embedding()
    teacher.drop_embedding()
    for index in range(student.n_blocks):
        job.progress("blocks", index, student.n_blocks)
        _advance(job, teacher, teacher.load_block(index), index, teacher_hidden)
        part = f"block-{index}"
        if (file := run.done(part)) is None:
            tensors, outcome = _train_block(job, (student, teacher), index, student_hidden, teacher_hidden)
            run.commit(part, tensors, asdict(outcome))
            file = run.file(part)
        tensors = load_file(file)
        trained |= tensors
        outcomes.append(Outcome.from_json(run.report(part)))
        _advance(job, student, student.load_block(index), index, untrained_hidden)
        _advance(job, student, _trained_block(job, student, index, tensors), index, student_hidden)
    job.progress("blocks", student.n_blocks, student.n_blocks)
    held_out = range(job.n_training, len(job.tokens))
    expected, actual = (
        memory.store(hidden.samples([row]) for row in held_out) for hidden in (teacher_hidden, student_hidden)
    )
    before, after = (_mean_kl(job, (student, teacher), hidden, expected) for hidden in (untrained_hidden, actual))
    better = after < before
    whole = Outcome(
        before=before,
        after=min(before, after),
        best_step=sum(outcome.best_step for outcome in outcomes) if better else 0,
        steps=sum(outcome.steps for outcome in outcomes),
        stopped=next((outcome.stopped for outcome in outcomes if outcome.stopped), None),
    )
    return trained if better else {}, whole, outcomes


def _train_block(
    job: DistillationJob,
    streams: tuple[ModelStream, ModelStream],
    index: int,
    inputs: StoredBatches[Tensor],
    targets: StoredBatches[Tensor],
) -> tuple[StoredTensors, Outcome]:
    """Train block `index`.

    Args:
        streams: student and teacher.
        inputs: `[batch, length, hidden]` each, from the student's trained blocks.
        targets: the teacher's outputs of the block, likewise.
    """
    student, teacher = streams
    options = job.options
    block = load_student_block(job, student, index)
    last = index == student.n_blocks - 1
    median = torch.cat([token_norms(batch).flatten() for batch in targets]).median()
    size = job.pass_samples
    sampler = BatchSampler(job.n_training, size * options.accumulate, f"{job.seed}:{index}")

    def loss(samples: list[int]) -> Tensor:
        output, target = block(inputs.samples(samples), False), targets.samples(samples)
        hidden = [target.flatten(0, 1)], [output.flatten(0, 1)]
        if last:
            return token_losses(options, _logits(job, teacher, target), _logits(job, student, output), *hidden)
        return hidden_losses(options, *hidden) if options.needs_hidden else relative_token_error(output, target, median)

    def backward(step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=job.device)
        for number in range(options.accumulate):
            samples = sampler.indices(step)[number * size : (number + 1) * size]
            mean = loss(samples).mean() / options.accumulate
            mean.backward()
            total += mean.detach()
        return total

    def held_out() -> float:
        errors = []
        for row in range(job.n_training, len(job.tokens)):
            output, target = block(inputs.samples([row]), True), targets.samples([row])
            if last:
                errors.append(kl_divergence(_logits(job, teacher, target), _logits(job, student, output)).mean())
            else:
                errors.append(relative_token_error(output, target, median).mean())
        return float(torch.stack(errors).mean())

    if not block.layers.initial:  # all dense: nothing to train
        error = held_out()
        return {}, Outcome(before=error, after=error, best_step=0, steps=0, curve=((0, None, error),))
    outcome = optimize(
        parameter_groups(
            [block.layers],
            block.biases.values(),
            tables_lr=options.tables_lr,
            weights_lr=options.weights_lr,
        ),
        backward,
        held_out,
        job.schedule,
        job.progress,
    )
    return block.stored(outcome), outcome


def _trained_block(job: DistillationJob, stream: ModelStream, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The student's block with the weights and biases of its trained layers."""
    block = stream.load_block(index)
    prefix = f"{stream.family.blocks}.{index}."
    for name, layer in job.student.quantized.items():
        if name.startswith(prefix):
            weight = layer.restore(name, tensors).to(stream.device)
            module = block.get_submodule(name.removeprefix(prefix))
            stream.set_weight(module, weight.dense())
            if (bias := tensors.get(f"{name}.bias")) is not None:
                module.get_parameter("bias").copy_(bias)
    return block


def _advance(
    job: DistillationJob, stream: ModelStream, block: nn.Module, index: int, hidden: StoredBatches[Tensor]
) -> None:
    with matmul_precision(fast=job.fast, device=stream.device):
        stream.advance(block, index, hidden)


def _mean_kl(
    job: DistillationJob,
    streams: tuple[ModelStream, ModelStream],
    hidden: StoredBatches[Tensor],
    targets: StoredBatches[Tensor],
) -> float:
    """Mean over samples of one length, from final hidden states; the logits of one sample are in memory at a time."""
    student, teacher = streams
    total = 0.0
    for own, target in zip(hidden, targets, strict=True):
        total += float(kl_divergence(_logits(job, teacher, target), _logits(job, student, own)).mean())
    return total / len(targets)


def _logits(job: DistillationJob, stream: ModelStream, hidden: Tensor) -> Tensor:
    """`[batch, length, hidden]` -> `[tokens, vocabulary]`."""
    with matmul_precision(fast=job.fast, device=stream.device):
        return stream.logits(hidden).flatten(0, 1)

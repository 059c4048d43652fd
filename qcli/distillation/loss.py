"""The loss of a student against its teacher, shared among processes."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.training.batches import BatchSampler
from qcli.algorithms.training.losses import kl_divergence
from qcli.distillation.job import DistillationJob
from qcli.distillation.predictions import Predictions
from qcli.distillation.student import Student
from qcli.distillation.teacher import TeacherFn
from qcli.distillation.token_losses import token_losses
from qcli.utils.distributed import Processes


class DistillationLoss:
    """A student's predictions against its teacher's, a mean over tokens; held-out samples are scored by plain KL,
    whatever the training loss.

    Processes share the passes of a step and the held-out samples; their number changes results only by rounding.
    `accumulate` must be a multiple of it.
    """

    def __init__(self, job: DistillationJob, student: Student, teacher: TeacherFn, processes: Processes) -> None:
        self.job, self.student, self.teacher, self.processes = job, student, teacher, processes
        self.sampler = BatchSampler(job.n_training, job.pass_samples * job.options.accumulate, job.seed)

    def backward(self, step: int) -> Tensor:
        """Add a step's gradients; returns its loss, a scalar on the device."""
        options, processes = self.job.options, self.processes
        total = torch.zeros((), dtype=torch.float64, device=self.job.device)
        passes, size, hidden = options.accumulate, self.job.pass_samples, options.needs_hidden
        for number in range(processes.rank, passes, processes.world_size):
            rows = self.sampler.indices(step)[number * size : (number + 1) * size]
            teacher = self.teacher(rows, hidden=hidden)
            student: Predictions = self.student(self.job.tokens[rows], final=False, hidden=hidden)
            logits = student.over(teacher.classes)
            loss = token_losses(options, teacher.logits, logits, teacher.hidden, student.hidden).mean() / passes
            (loss * processes.world_size).backward()  # FSDP averages gradients
            total += loss.detach()
        processes.add_up(total)
        return total

    def held_out(self) -> float:
        """Mean KL divergence of the held-out samples, nats per token; over the teacher's classes if it has them."""
        tokens, size, processes = self.job.tokens, self.job.pass_samples, self.processes
        total = torch.zeros((), dtype=torch.float64, device=self.job.device)
        held_out = range(self.job.n_training, len(tokens))
        passes = [list(held_out[first : first + size]) for first in range(0, len(held_out), size)]
        padding = -len(passes) % processes.world_size  # FSDP needs the same number of passes in every process
        for number in range(processes.rank, len(passes) + padding, processes.world_size):
            rows = passes[number % len(passes)]
            teacher = self.teacher(rows, hidden=False)
            student: Predictions = self.student(tokens[rows], final=True, hidden=False)
            if number < len(passes):
                total += kl_divergence(teacher.logits, student.over(teacher.classes)).sum()
        processes.add_up(total)
        return float(total) / (len(held_out) * tokens.shape[1])

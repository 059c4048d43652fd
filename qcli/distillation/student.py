"""A quantized model that can be trained.

A block of the student computes its weights from codes and tables each time it runs, so dense weights of only one block
exist at a time, and the parameters of a block can be sharded over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qcli.algorithms.training.outcome import Outcome
from qcli.algorithms.training.trainable_bias import TrainableBias
from qcli.algorithms.training.trainable_weight import TrainableWeights
from qcli.distillation.job import DistillationJob
from qcli.distillation.predictions import Predictions, predict
from qcli.models.quantized import stored_tensors
from qcli.models.stream import BlockForward, ModelStream
from qcli.utils.device import linear_dtype, matmul_precision

StoredTensors = dict[str, Tensor]
"""Tensors of quantized layers as a checkpoint has them, by full name."""


class StudentBlock(nn.Module):
    """Block `index` of a stream with trained weights and biases in place of its own.

    Args:
        layers: by path of a linear in the block.
        biases: by path, of those layers that have one.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        fast: whether matrix products with activations may use bf16 or TF32 units; those that compute weights never do.
    """

    def __init__(
        self,
        stream: ModelStream,
        index: int,
        layers: TrainableWeights,
        biases: Mapping[str, TrainableBias],
        *,
        checkpointing: bool,
        fast: bool,
    ) -> None:
        super().__init__()
        self.stream, self.index, self.checkpointing, self.fast = stream, index, checkpointing, fast
        self.block = stream.load_block(index)
        for path in layers.initial:
            self.block.get_submodule(path).register_parameter("weight", None)
        self.layers, self._biased = layers, list(biases)
        self._biases = nn.ModuleList(biases.values())

    @property
    def biases(self) -> dict[str, TrainableBias]:
        """By path, of the layers that have one."""
        return dict(zip(self._biased, cast("Iterable[TrainableBias]", self._biases), strict=True))

    def forward(self, hidden: Tensor, final: bool) -> Tensor:
        """`[batch, length, hidden]` -> the same shape; `final`: with weights exactly as they will be stored."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return self._run(hidden, final)
        return cast("Tensor", checkpoint(self._run, hidden, final, use_reentrant=False))

    def stored(self, outcome: Outcome) -> StoredTensors:
        """The layers as a checkpoint stores them; unchanged if training did not improve them."""
        tensors: StoredTensors = {}
        trained = self.layers.quantized() if outcome.best_step else self.layers.initial
        for path, layer in trained.items():
            weight = layer.to("cpu")
            weight.check()
            tensors |= stored_tensors(self._name(path), weight)
        for path, bias in self.biases.items():
            tensors[f"{self._name(path)}.bias"] = (bias.stored() if outcome.best_step else bias.initial).cpu()
        return tensors

    def _name(self, path: str) -> str:
        return f"{self.stream.family.blocks}.{self.index}.{path}"

    def _run(self, hidden: Tensor, final: bool) -> Tensor:
        with matmul_precision(fast=False):
            weights = self.layers.dense(as_stored=final, dtype=linear_dtype(fast=self.fast))
        biases = {path: bias.value(as_stored=final) for path, bias in self.biases.items()}
        with matmul_precision(fast=self.fast, device=self.stream.device):
            return self.stream.run_block(self.block, self.index, hidden, weights, biases)


class Student(nn.Module):
    """Trained blocks between a stream's embedding and its head."""

    def __init__(self, stream: ModelStream, blocks: Sequence[StudentBlock], *, fast: bool) -> None:
        super().__init__()
        self.stream, self._blocks, self.fast = stream, nn.ModuleList(blocks), fast

    @property
    def blocks(self) -> list[StudentBlock]:
        """In order."""
        return list(cast("Iterable[StudentBlock]", self._blocks))

    def forward(self, tokens: Tensor, *, final: bool, hidden: bool) -> Predictions:
        """int64 `[samples, length]`; `final` as for `StudentBlock`, `hidden` as for `predict`."""
        blocks = (_forward(block, final) for block in self.blocks)
        return predict(self.stream, blocks, tokens, hidden=hidden, fast=self.fast)


def load_student_block(job: DistillationJob, stream: ModelStream, index: int) -> StudentBlock:
    """Block `index` of the student, with trainable quantized layers; their biases are trained, too."""
    prefix = f"{stream.family.blocks}.{index}."
    stored = job.student.read(
        bias
        for name in job.student.quantized
        if name.startswith(prefix) and (bias := f"{name}.bias") in job.student.extents
    )
    biases = {
        name.removeprefix(prefix).removesuffix(".bias"): TrainableBias(bias.to(job.device))
        for name, bias in stored.items()
    }
    weights = {
        name.removeprefix(prefix): job.student.read_quantized(name).to(job.device)
        for name in job.student.quantized
        if name.startswith(prefix)
    }
    layers = TrainableWeights(weights, None, job.options.train)
    return StudentBlock(stream, index, layers, biases, checkpointing=job.options.checkpointing, fast=job.fast)


def _forward(block: StudentBlock, final: bool) -> BlockForward:
    return lambda hidden: cast("Tensor", block(hidden, final))

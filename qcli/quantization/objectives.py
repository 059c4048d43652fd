"""Objectives of training: the output of linears, of a block, or of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.training.batches import Sampling, Split
from qcli.algorithms.training.loop import Weights
from qcli.algorithms.training.losses import relative_token_error, token_norms
from qcli.models.stream import ModelStream
from qcli.quantization.ranks import ALONE, no_loss, own_samples, shared_loss
from qcli.utils.device import matmul_precision
from qcli.utils.distributed import Processes
from qcli.utils.stored_batches import StoredBatches


class BlockObjective:
    """Relative squared error of a block's output, a mean over tokens (see `relative_token_error`).

    Args:
        forward: runs the block on hidden states with the given weights in place of its own.
        inputs: from the quantized stream, `[batch, length, hidden]` each.
        targets: the full-precision block's outputs, likewise.
        sampling: of the training samples.
        processes: that the samples are divided among, by `Processes.share`.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Weights], Tensor],
        inputs: Split[StoredBatches[Tensor]],
        targets: Split[StoredBatches[Tensor]],
        sampling: Sampling,
        processes: Processes = ALONE,
    ) -> None:
        self.forward, self.inputs, self.targets, self.processes = forward, inputs, targets, processes
        norms = torch.cat([token_norms(batch).flatten() for batch in targets.training])
        self.median = torch.cat(processes.exchange(norms)).median()
        shapes = [batch.shape[:2] for batch in inputs.training]
        samples = int(processes.sum(sum(count for count, _ in shapes)))
        tokens = int(processes.sum(sum(count * length for count, length in shapes)))
        self.sampler, self.own = sampling.sampler(samples, tokens // samples), processes.share(samples)
        self.one_length = len({length for _, length in shapes}) == 1  # as windows of text are, but not images

    def loss(self, weights: Weights, step: int) -> Tensor:
        indices = self.sampler.indices(step)
        own = own_samples(indices, self.own)

        def loss(weights: Weights) -> Tensor:
            if not own:
                return no_loss(weights)
            if self.one_length:
                inputs, targets = (side.training.samples(own) for side in (self.inputs, self.targets))
                error = self._error(weights, inputs, targets).mean()
            else:
                pairs = zip(*(side.training.picked(own) for side in (self.inputs, self.targets)), strict=True)
                each = (self._error(weights, *(sample[None] for sample in pair)) for pair in pairs)
                error = torch.cat([errors.flatten() for errors in each]).mean()
            return error if len(own) == len(indices) else error * (len(own) / len(indices))

        return shared_loss(loss, weights, self.processes)

    def held_out(self, weights: Weights) -> float:
        pairs = zip(self.inputs.held_out, self.targets.held_out, strict=True)
        errors = [self._error(weights, inputs, targets).flatten() for inputs, targets in pairs]
        mean = float(torch.cat(errors).mean()) if errors else 0.0
        return self.processes.mean(mean, sum(map(len, errors)))

    def _error(self, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        return relative_token_error(self.forward(inputs, weights).float(), targets, self.median)


class LinearObjective:
    """Output error of linears that read one input, by the moments of that input: every step sees all tokens.

    `E|y - W^ x~|^2`, `y` what the full-precision layer gives (and, for layers that write to the residual stream,
    what that stream has lost), relative to `E|W x~|^2` and up to a constant that no training changes.
    """

    def __init__(self, group: LinearGroup, held: LinearGroup) -> None:
        self.sides = [_quadratic(side) for side in (group, held)]

    def loss(self, weights: Weights, step: int) -> Tensor:
        return self._error(weights, 0)

    def held_out(self, weights: Weights) -> float:
        return float(self._error(weights, 1))

    def _error(self, weights: Weights, side: int) -> Tensor:
        hessian, right, size = self.sides[side]
        stacked = torch.cat([weights[path] for path in right])
        error = (stacked @ hessian * stacked).sum() - 2 * (stacked * torch.cat(list(right.values()))).sum()
        return 1 + error / size


class ModelObjective:
    """Next-token loss of the whole model, a mean over tokens: against the text, or the KL divergence from what the
    full-precision model predicts.

    Args:
        stream: the model.
        blocks: all of its blocks, with their original weights; weights go by `BLOCK.PATH`.
        tokens: int64 `[samples, length]`.
        sampling: of the training samples.
        predictions: whether the target is the full-precision model's prediction.
        fast: whether matrix products may use bf16 or TF32 units.
        simulate: makes inputs of linears quantized until it is left; for the trained model, not for its target.
        processes: that share the samples of a step; all have the whole model and all tokens.
    """

    def __init__(
        self,
        stream: ModelStream,
        blocks: list[nn.Module],
        tokens: Split[Tensor],
        sampling: Sampling,
        *,
        predictions: bool,
        fast: bool,
        simulate: Callable[[], AbstractContextManager[object]] = nullcontext,
        processes: Processes = ALONE,
    ) -> None:
        self.stream, self.blocks, self.tokens, self.processes = stream, blocks, tokens, processes
        self.predictions, self.fast, self.simulate = predictions, fast, simulate
        self.sampler = sampling.sampler(len(tokens.training), tokens.training.shape[1])

    def loss(self, weights: Weights, step: int) -> Tensor:
        indices = self.sampler.indices(step)
        own = [indices[place] for place in self.processes.share(len(indices))]

        def loss(weights: Weights) -> Tensor:
            if not own:
                return no_loss(weights)
            error = self._error(weights, self.tokens.training[own])
            return error if len(own) == len(indices) else error * (len(own) / len(indices))

        return shared_loss(loss, weights, self.processes)

    def held_out(self, weights: Weights) -> float:
        own = [self.tokens.held_out[sample] for sample in self.processes.share(len(self.tokens.held_out))]
        errors = [self._error(weights, sample[None]) for sample in own]
        return self.processes.mean(float(torch.stack(errors).mean()) if errors else 0.0, len(errors))

    def _error(self, weights: Weights, tokens: Tensor) -> Tensor:
        predicted = self._logits(tokens, weights, self.simulate)[:, :-1].flatten(0, 1).log_softmax(-1)
        if not self.predictions:
            return F.nll_loss(predicted, tokens[:, 1:].flatten().to(predicted.device))
        with torch.no_grad():
            target = self._logits(tokens, {}, nullcontext)[:, :-1].flatten(0, 1).log_softmax(-1)
        return F.kl_div(predicted, target, log_target=True, reduction="batchmean")

    def _logits(
        self, tokens: Tensor, weights: Weights, simulate: Callable[[], AbstractContextManager[object]]
    ) -> Tensor:
        forwards = (partial(self._run, index, weights, simulate) for index in range(len(self.blocks)))
        with matmul_precision(fast=self.fast, device=self.stream.device):
            return self.stream.logits_of(tokens, forwards).float()

    def _run(
        self, index: int, weights: Weights, simulate: Callable[[], AbstractContextManager[object]], hidden: Tensor
    ) -> Tensor:
        """Run one block. Its activations are computed once more in the backward pass: those of all do not fit."""
        prefix = f"{index}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}

        def run(hidden: Tensor) -> Tensor:
            with simulate(), matmul_precision(fast=self.fast, device=self.stream.device):
                return self.stream.run_block(self.blocks[index], index, hidden, own)

        if not (own and torch.is_grad_enabled()):
            return run(hidden)
        output: Tensor = checkpoint(run, hidden, use_reentrant=False)
        return output


def _quadratic(group: LinearGroup) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """`H`; by path what the wanted outputs are to the inputs, `E[y^T x~]`; and `tr(W H W^T)` over all."""
    assert group.hessian is not None
    outputs = {path: weight @ group.hessian for path, weight in group.weights.items()}
    size = torch.stack([(outputs[path] * weight).sum() for path, weight in group.weights.items()]).sum()
    if group.output_gap is not None:
        (path,) = outputs
        return group.hessian, {path: outputs[path] + group.output_gap}, size
    assert group.cross is not None
    return group.hessian, {path: weight @ group.cross for path, weight in group.weights.items()}, size

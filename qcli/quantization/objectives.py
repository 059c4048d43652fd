"""What trained weights are judged by: the outputs of linears, of a block, or of the whole model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.training.loop import Weights
from qcli.core.activations import Activations
from qcli.models.stream import ModelStream
from qcli.utils.device import matmul_precision


class BlockObjective:
    """Relative squared error of a block's output, a mean over tokens (see `token_errors`).

    Args:
        stream: the model.
        index: of the block.
        block: its module; of the weights that the objective is not asked about, and of norms.
        inputs: `[batch, length, hidden]` each, from the quantized stream.
        targets: the full-precision block's outputs, likewise.
        held_inputs, held_targets: of the held-out samples.
        batch_tokens: of a training step.
        seed: of the samples' order.
        fast: whether matrix products may use bf16 or TF32 units.
    """

    def __init__(
        self,
        stream: ModelStream,
        index: int,
        block: nn.Module,
        inputs: list[Tensor],
        targets: list[Tensor],
        held_inputs: list[Tensor],
        held_targets: list[Tensor],
        *,
        batch_tokens: int,
        seed: str,
        fast: bool,
    ) -> None:
        self.stream, self.index, self.block, self.fast = stream, index, block, fast
        self.inputs, self.targets = inputs, targets
        self.held = list(zip(held_inputs, held_targets, strict=True))
        self.median = torch.cat([token_lengths(batch).flatten() for batch in targets]).median()
        self.size = max(1, batch_tokens // inputs[0].shape[1])
        self.order = Order(sum(len(batch) for batch in inputs), seed)

    def loss(self, weights: Weights, step: int) -> Tensor:
        picks = self.order.take(step, self.size)
        return self._error(weights, rows(self.inputs, picks), rows(self.targets, picks)).mean()

    def held_out(self, weights: Weights) -> float:
        errors = [self._error(weights, inputs, targets).flatten() for inputs, targets in self.held]
        return float(torch.cat(errors).mean())

    def _error(self, weights: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
        with matmul_precision(fast=self.fast, device=self.stream.device):
            outputs = self.stream.run_block(self.block, self.index, inputs, weights).float()
        return token_errors(outputs, targets, self.median)


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
    """Next-token loss of the whole model, a mean over tokens: against the text, or against what the model predicts
    in full precision (KL divergence).

    Args:
        stream: the model.
        blocks: all of its blocks, with their original weights; weights go by `BLOCK.PATH`.
        tokens: int64 `[samples, length]` to train on.
        held: likewise, held out.
        predictions: whether the target is the full-precision model's prediction.
        batch_tokens, seed, fast: as for `BlockObjective`.
        simulated: how the inputs of these linears are quantized, in the model that is judged and not in its target.
    """

    def __init__(
        self,
        stream: ModelStream,
        blocks: list[nn.Module],
        tokens: Tensor,
        held: Tensor,
        *,
        predictions: bool,
        batch_tokens: int,
        seed: str,
        fast: bool,
        simulated: tuple[Activations | None, Sequence[nn.Module]] = (None, ()),
    ) -> None:
        self.stream, self.blocks, self.fast, self.predictions = stream, blocks, fast, predictions
        self.simulated = simulated
        self.tokens, self.held = tokens, held
        self.size = max(1, batch_tokens // tokens.shape[1])
        self.order = Order(len(tokens), seed)

    def loss(self, weights: Weights, step: int) -> Tensor:
        return self._error(weights, self.tokens[self.order.take(step, self.size)])

    def held_out(self, weights: Weights) -> float:
        errors = [self._error(weights, self.held[row : row + 1]) for row in range(len(self.held))]
        return float(torch.stack(errors).mean())

    def _error(self, weights: Weights, tokens: Tensor) -> Tensor:
        activations, linears = self.simulated
        hooks = [activations.simulate(linear) for linear in linears] if activations is not None else []
        try:
            found = self._logits(tokens, weights)[:, :-1].flatten(0, 1).log_softmax(-1)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.predictions:
            return F.nll_loss(found, tokens[:, 1:].flatten().to(found.device))
        with torch.no_grad():
            wanted = self._logits(tokens, {})[:, :-1].flatten(0, 1).log_softmax(-1)
        return F.kl_div(found, wanted, log_target=True, reduction="batchmean")

    def _logits(self, tokens: Tensor, weights: Weights) -> Tensor:
        with matmul_precision(fast=self.fast, device=self.stream.device):
            by_block = _by_block(weights)
            blocks = (
                partial(self.stream.run_block, block, index, weights=by_block.get(str(index)))
                for index, block in enumerate(self.blocks)
            )
            return self.stream.logits_of(tokens, blocks).float()


def _by_block(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """`BLOCK.PATH` -> block -> path."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        block, _, path = name.partition(".")
        found.setdefault(block, {})[path] = weight
    return found


def _quadratic(group: LinearGroup) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """`H`, `W G + R` by path, and `tr(W H W^T)` over all."""
    assert group.hessian is not None and group.cross is not None
    right = {path: weight @ group.cross for path, weight in group.weights.items()}
    if group.residual_cross is not None:
        (path,) = right
        right[path] = right[path] + group.residual_cross
    stacked = torch.cat(list(group.weights.values()))
    return group.hessian, right, (stacked @ group.hessian * stacked).sum()


def token_errors(outputs: Tensor, targets: Tensor, median: Tensor) -> Tensor:
    """Relative squared error of each token, `|y - y^|^2 / (|y| min(|y|, m))`, `m` the median of `|y|` (ours).

    The few tokens whose outputs are a hundred times the others' size carry the attention of all that follow. Relative
    to `|y|^2` they count for nothing, and training ruins them; relative to `m^2` nothing else counts.

    Args:
        outputs, targets: `[..., hidden]`.
    """
    length = token_lengths(targets)
    return (outputs.float() - targets.float()).square().sum(-1) / (length * length.minimum(median)).clamp(min=1e-12)


def token_lengths(outputs: Tensor) -> Tensor:
    """`|y|` of each token, float32."""
    return outputs.float().square().sum(-1).sqrt()


class Order:
    """Samples in an order shuffled anew each time all have been seen."""

    def __init__(self, count: int, seed: str) -> None:
        self.count, self.seed = count, seed

    def take(self, step: int, size: int) -> list[int]:
        """The `size` samples of a step."""
        places = range(step * size, (step + 1) * size)
        return [self._round(place // self.count)[place % self.count] for place in places]

    def _round(self, number: int) -> list[int]:
        samples = list(range(self.count))
        random.Random(f"{self.seed}:{number}").shuffle(samples)
        return samples


def rows(batches: list[Tensor], picks: Sequence[int]) -> Tensor:
    """Samples by their number, from batches of which only the last may be smaller."""
    size = len(batches[0])
    return torch.stack([batches[pick // size][pick % size] for pick in picks])

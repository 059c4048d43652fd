"""Sensitivity of each layer to each width: the predicted KL divergence of quantizing that layer alone.

To second order, an error `E` of one layer's weight changes the predictions of a sequence by
`1/2 (sum_t delta_t E x_t)^2` nats: `x` the layer's inputs, `delta` the gradient, with respect to its outputs, of the
log-probability of tokens drawn from the model's own predictions. The expectation over sequences is factored as in K-FAC
(arXiv 1503.05671) and split in two, `m` the mean input and `L` the tokens of a sequence; in nats per token:

    1/2 sum_i  E[delta_i^2] (E C E^T)_ii  +  E[(sum_t delta_ti)^2] (E m)_i^2 / L

Errors that vary from token to token add up in squares, `C` being the covariance of the inputs. The part that all tokens
share adds up linearly: attention averages values, which does not reduce it. In `m` and `C` tokens are weighted by
`|delta|^2`, so the few whose inputs are a hundred times larger hardly count. `E` is the actual error of the method at
each width.

One forward and one backward pass, a block at a time; only the hidden states that enter each block are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method
from qcli.data.draws import draw
from qcli.models.families import Linear
from qcli.models.listed_experts import Expert
from qcli.models.stream import ModelStream, batches
from qcli.quantization.search_space import SearchSpace
from qcli.quantization.solve import solve
from qcli.utils.progress import Progress
from qcli.utils.stored_batches import BatchMemory, StoredBatches

Losses = dict[str, list[float]]

_LOGITS = 1 << 24  # in memory at a time


def sensitivities(
    space: SearchSpace,
    stream: ModelStream,
    tokens: Tensor,
    once: Callable[[int, Callable[[], Losses]], Losses],
    progress: Progress,
) -> Losses:
    """Predicted loss in nats per token, by layer and candidate; infinite where a layer does not fit a candidate.

    Args:
        stream: the model in full precision.
        tokens: int64 `[samples, length]`.
        once: given a block and a function that computes its losses, returns them, perhaps from an interrupted run.
    """
    memory = BatchMemory(stream.device, on_host=stream.device.type != "cpu")
    entering = [memory.store(map(stream.embed, batches(tokens)))]
    for index in range(stream.n_blocks):
        outputs = entering[-1].copy()
        stream.advance(stream.load_block(index), index, outputs)
        entering.append(outputs)
    gradients = _of_predictions(stream, entering.pop(), space.recipe.seed)
    losses: Losses = {}
    for done, index in enumerate(reversed(range(stream.n_blocks))):
        progress("sensitivity", done, stream.n_blocks)
        block = stream.load_block(index)
        layers = [layer for layer in space.layers if layer.block == index]
        statistics = _GradientStatistics(block, stream.family.paths_of(index))
        gradients = _backward(stream, block, index, entering.pop(), gradients, statistics)
        losses |= once(index, partial(_predicted, space, layers, statistics))
    progress("sensitivity", stream.n_blocks, stream.n_blocks)
    return losses


class _GradientStatistics:
    """Second moments of the inputs of linears and of the gradients of their outputs; sums over tokens, by path.

    Attributes:
        inputs: `x^T x`, `[in, in]`.
        weighted: the same with each token weighted by its gradient, `|delta|^2 x^T x`.
        mean: `|delta|^2 x`, `[in]`.
        energy: `delta^2`, `[out]`.
        together: the square of each sequence's summed gradient, `(sum_t delta)^2`, `[out]`.
        sequences, length: number of sequences in the current batch, and of the tokens of each.
        experts: by path, the expert that a linear belongs to.
    """

    def __init__(self, block: nn.Module, paths: Sequence[str]) -> None:
        self.modules = {path: block.get_submodule(path) for path in paths}
        parents = {path: block.get_submodule(path.rpartition(".")[0]) for path in paths}
        self.experts = {path: parent for path, parent in parents.items() if isinstance(parent, Expert)}
        self.inputs: dict[str, Tensor] = {}
        self.weighted: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self.together: dict[str, Tensor] = {}
        self.tokens = self.sequences = self.length = 0

    def watched(self) -> ExitStack:
        """Within: forward and backward passes are added to the sums."""
        hooks = ExitStack()
        for path, module in self.modules.items():
            hooks.callback(module.register_forward_hook(self._note(path), with_kwargs=True).remove)
        return hooks

    def divergence(self, path: str, error: Tensor) -> float:
        """Predicted KL divergence, nats per token, of an error `[out, in]` of a linear's weight."""
        energy = self.energy[path]
        total = energy.sum().clamp(min=1e-30)
        common = error @ (self.mean[path] / total)
        apart = ((error @ self.weighted[path]) * error).sum(1) / total - common.square()
        return float((energy * apart + self.together[path] * common.square()).sum()) / (2 * self.tokens)

    def _note(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            (given,) = (*args, *kwargs.values())
            x = given.detach().flatten(0, -2).float()
            _add(self.inputs, path, x.T @ x)
            tokens = self.experts[path].tokens if path in self.experts else None

            def take(gradient: Tensor) -> None:
                delta = gradient.detach().flatten(0, -2).float()
                weighted_inputs = x * delta.square().sum(1, keepdim=True)
                _add(self.weighted, path, weighted_inputs.T @ x)
                _add(self.mean, path, weighted_inputs.sum(0))
                _add(self.energy, path, delta.square().sum(0))
                _add(self.together, path, self._by_sequence(delta, tokens).square().sum(0))

            output.register_hook(take)

        return note

    def _by_sequence(self, delta: Tensor, tokens: Tensor | None) -> Tensor:
        """Sums over sequences, `[sequences, out]`; `tokens` says which tokens of the batch these are, if not all."""
        if tokens is None:
            whole: Tensor = delta.unflatten(0, (self.sequences, -1))
            return whole.sum(1)
        sums = delta.new_zeros(self.sequences, delta.shape[1])
        return sums.index_add_(0, tokens // self.length, delta)


def _add(sums: dict[str, Tensor], path: str, value: Tensor) -> None:
    sums[path] = sums[path] + value if path in sums else value


def _of_predictions(stream: ModelStream, hidden: StoredBatches[Tensor], seed: int) -> StoredBatches[Tensor]:
    """Gradients, with respect to the last hidden states, of log-probabilities of tokens that the model draws itself."""
    generator = torch.Generator().manual_seed(seed)
    positions = max(1, _LOGITS // stream.config.get_text_config().vocab_size)
    gradients: StoredBatches[Tensor] = hidden.memory.store()
    for batch in hidden:
        flat = batch.flatten(0, 1)
        parts = []
        for part in torch.split(flat, positions):
            states = part[None].requires_grad_()
            log = stream.logits(states)[0].float().log_softmax(-1)
            uniform = torch.rand(len(part), dtype=torch.float64, generator=generator).to(stream.device)
            drawn = draw(log.detach().double().exp(), uniform)
            (gradient,) = torch.autograd.grad(log.gather(-1, drawn[:, None]).sum(), states)
            parts.append(gradient[0])
        gradients.append(torch.cat(parts).view_as(batch))
    return gradients


def _backward(
    stream: ModelStream,
    block: nn.Module,
    index: int,
    hidden: StoredBatches[Tensor],
    gradients: StoredBatches[Tensor],
    statistics: _GradientStatistics,
) -> StoredBatches[Tensor]:
    """Gradients with respect to a block's inputs, from those of its outputs."""
    input_gradients: StoredBatches[Tensor] = hidden.memory.store()
    with statistics.watched():
        for states, gradient in zip(hidden, gradients, strict=True):
            statistics.sequences, statistics.length = states.shape[:2]
            entering = states.detach().requires_grad_()
            output = stream.run_block(block, index, entering)
            (back,) = torch.autograd.grad(output, entering, gradient)
            statistics.tokens += states.shape[0] * states.shape[1]
            input_gradients.append(back)
    return input_gradients


@torch.no_grad()
def _predicted(space: SearchSpace, layers: Sequence[Linear], statistics: _GradientStatistics) -> Losses:
    """The losses of a block's layers; those that read one input are quantized together, as in the real run."""
    losses = {layer.name: [inf] * len(space.candidates) for layer in layers}
    for members in _grouped(layers, statistics.experts):
        if members[0].path not in statistics.inputs:  # of an expert that no token was routed to
            continue
        hessian = statistics.inputs[members[0].path] / statistics.tokens
        weights = {layer.name: ModelStream.weight_of(statistics.modules[layer.path]).float() for layer in members}
        for candidate, method in enumerate(space.candidates):
            fitting = [layer for layer in members if space.sizes[layer.name][candidate] is not None]
            if not fitting:
                continue
            group = LinearGroup({layer.name: weights[layer.name] for layer in fitting}, hessian, cross=hessian)
            quantized = _quantized(space, method, group)
            for layer in fitting:
                error = weights[layer.name] - quantized[layer.name]
                losses[layer.name][candidate] = statistics.divergence(layer.path, error)
    reached = [layer for layer in layers if layer.path in statistics.inputs]
    for layer in layers:
        if layer.path not in statistics.inputs:
            losses[layer.name] = _least_of_others(layer, reached, losses)
    return losses


def _least_of_others(layer: Linear, reached: Sequence[Linear], losses: Losses) -> list[float]:
    """The losses of a layer of an expert that no token was routed to: the least that other experts have. Without any,
    it would get the fewest bits, whatever text the model sees later."""
    end = layer.path.rpartition(".")[2]
    others = [losses[each.name] for each in reached if each.group == layer.group and each.path.endswith(f".{end}")]
    return [min(each) for each in zip(*others, strict=True)]


def _quantized(space: SearchSpace, method: Method, group: LinearGroup) -> dict[str, Tensor]:
    solutions = solve(method, space.recipe.low_rank, group)
    return {name: solution.weight.dense() for name, solution in solutions.items()}


def _grouped(layers: Sequence[Linear], experts: Mapping[str, Expert]) -> list[list[Linear]]:
    groups: dict[tuple[int, Expert | None], list[Linear]] = {}
    for layer in layers:
        groups.setdefault((layer.group, experts.get(layer.path)), []).append(layer)
    return list(groups.values())

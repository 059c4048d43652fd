"""What each width of each layer would cost: the predicted KL divergence of quantizing that layer alone.

To second order, an error `E` of one layer's weight moves the predictions by

    KL = 1/2 sum_i g_i (E H E^T)_ii   nats per token,   H = E[x^T x],   g_i = E[delta_i^2]

`x` the layer's inputs, `delta` the gradient of the log-probability of a token drawn from the model's own prediction
with respect to the layer's outputs: the Fisher information in Kronecker's form (K-FAC, arXiv 1503.05671), of its
output factor the diagonal. `E` is what the method really leaves in each width. One pass forward and one backward, a
block at a time; of all blocks only the hidden states that enter them are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from qcli.allocation import Choices
from qcli.method import LinearGroup, Method
from qcli.models.arch import Linear
from qcli.models.stream import ModelStream
from qcli.progress import Progress

Losses = dict[str, list[float]]

_BATCH_TOKENS = 4096  # in flight in one block
_LOGITS = 1 << 24  # in memory at a time


def sensitivities(
    found: Choices,
    stream: ModelStream,
    tokens: Tensor,
    kept: Callable[[int, Callable[[], Losses]], Losses],
    progress: Progress,
) -> Losses:
    """Predicted loss, nats per token, by layer and option; infinite for options that do not fit.

    Args:
        stream: the model in full precision.
        tokens: int64 `[samples, length]`.
        kept: given a block and how its losses are found, gives them; perhaps from an earlier run.
    """
    batches = torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1]))
    entering: list[list[Tensor]] = [[stream.embed(batch).cpu() for batch in batches]]
    with torch.no_grad():
        for index in range(stream.n_blocks):
            block = stream.load_block(index)
            entering.append([stream.run_block(block, index, h.to(stream.device)).cpu() for h in entering[-1]])
    gradients = _of_predictions(stream, entering.pop(), found.recipe.seed)
    losses: Losses = {}
    for done, index in enumerate(reversed(range(stream.n_blocks))):
        progress("sensitivity", done, stream.n_blocks)
        block = stream.load_block(index)
        layers = [layer for layer in found.layers if layer.block == index]
        moments = _Moments(block, [path for group in stream.family.groups for path in group.linears])
        gradients = _backward(stream, block, index, entering.pop(), gradients, moments)

        def solve(layers: list[Linear] = layers, moments: _Moments = moments) -> Losses:
            return dict(_predicted(found, layers, moments))

        losses |= kept(index, solve)
    progress("sensitivity", stream.n_blocks, stream.n_blocks)
    return losses


class _Moments:
    """Second moments of the inputs of linears, and of the gradients of their outputs; sums over tokens."""

    def __init__(self, block: nn.Module, paths: Sequence[str]) -> None:
        self.modules = {path: block.get_submodule(path) for path in paths}
        self.inputs: dict[str, Tensor] = {}  # E[x^T x] `[in, in]` by path
        self.energy: dict[str, Tensor] = {}  # of output gradients, `[out]` by path
        self.tokens = 0

    def watched(self) -> ExitStack:
        """Within: forward and backward passes are counted."""
        hooks = ExitStack()
        for path, module in self.modules.items():
            hooks.callback(module.register_forward_hook(self._note(path), with_kwargs=True).remove)
        return hooks

    def _note(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            (x,) = (*args, *kwargs.values())
            x = x.detach().flatten(0, -2).float()
            self.inputs[path] = self.inputs.get(path, torch.zeros((), device=x.device)) + x.T @ x
            output.register_hook(take)

        def take(gradient: Tensor) -> None:
            energy = gradient.detach().flatten(0, -2).float().square().sum(0)
            self.energy[path] = self.energy.get(path, torch.zeros_like(energy)) + energy

        return note


def _of_predictions(stream: ModelStream, hidden: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients, with respect to the last hidden states, of log-probabilities of tokens that the model draws itself."""
    generator = torch.Generator().manual_seed(seed)
    positions = max(1, _LOGITS // stream.config.get_text_config().vocab_size)
    gradients = []
    for batch in hidden:
        flat = batch.flatten(0, 1)
        parts = []
        for part in torch.split(flat, positions):
            states = part.to(stream.device)[None].requires_grad_()
            log = stream.logits(states)[0].float().log_softmax(-1)
            uniform = torch.rand(len(part), 1, dtype=torch.float64, generator=generator).to(stream.device)
            cumulative = log.detach().double().exp().cumsum(-1)
            drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp_(max=log.shape[-1] - 1)
            (gradient,) = torch.autograd.grad(log.gather(-1, drawn).sum(), states)
            parts.append(gradient[0].cpu())
        gradients.append(torch.cat(parts).view_as(batch))
    return gradients


def _backward(
    stream: ModelStream, block: nn.Module, index: int, hidden: list[Tensor], gradients: list[Tensor], moments: _Moments
) -> list[Tensor]:
    """Gradients with respect to a block's inputs, from those of its outputs."""
    found = []
    with moments.watched():
        for states, gradient in zip(hidden, gradients, strict=True):
            entering = states.to(stream.device).requires_grad_()
            output = stream.run_block(block, index, entering)
            (back,) = torch.autograd.grad(output, entering, gradient.to(stream.device))
            moments.tokens += states.shape[0] * states.shape[1]
            found.append(back.cpu())
    return found


@torch.no_grad()
def _predicted(found: Choices, layers: Sequence[Linear], moments: _Moments) -> Iterator[tuple[str, list[float]]]:
    """The losses of a block's layers; those that read one input are quantized together, as they will be."""
    losses = {layer.name: [inf] * len(found.options) for layer in layers}
    for members in _grouped(layers):
        hessian = moments.inputs[members[0].path] / moments.tokens
        weights = {layer.name: ModelStream.weight_of(moments.modules[layer.path]).float() for layer in members}
        for option, method in enumerate(found.options):
            fitting = [layer for layer in members if found.stored[layer.name][option] is not None]
            if not fitting:
                continue
            group = LinearGroup({layer.name: weights[layer.name] for layer in fitting}, hessian, cross=hessian)
            quantized = _quantized(found, method, group)
            for layer in fitting:
                error = weights[layer.name] - quantized[layer.name]
                energy = moments.energy.get(layer.path, torch.zeros(len(error))) / moments.tokens
                loss = 0.5 * (energy.to(error) * ((error @ hessian) * error).sum(1)).sum()
                losses[layer.name][option] = float(loss)
    yield from losses.items()


def _quantized(found: Choices, method: Method, group: LinearGroup) -> dict[str, Tensor]:
    solutions = method.quantize(group)
    if found.recipe.low_rank is not None:
        solutions = found.recipe.low_rank.compensate(method, group, solutions)
    return {name: solution.weight.dense() for name, solution in solutions.items()}


def _grouped(layers: Sequence[Linear]) -> list[list[Linear]]:
    groups: dict[int, list[Linear]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return list(groups.values())

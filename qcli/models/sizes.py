"""Sizes of a model that estimates of memory are made of; from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from qcli.algorithms.solvers.tiles import together
from qcli.models.families import Linear
from qcli.models.source import ModelSource

BATCH_TOKENS = 4096  # in one pass through a block
_EXPERT_STATISTICS = 1 << 30  # bytes of the Hessians of experts that one pass collects
_STATES, _INNER = 11, 4  # hidden states, and outputs inside the MLP, that live together in a pass


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of elements.

    Attributes:
        layers: the linears of the block that has the most weights.
        outside: all tensors outside of the blocks that text passes: embedding, head, final norm.
        beside: all tensors that text does not pass, such as vision towers.
        hidden, inner: widths of the hidden states, and of the widest input or output of a linear.
    """

    layers: list[Linear]
    outside: int
    beside: int
    hidden: int
    inner: int

    @classmethod
    def of(cls, source: ModelSource) -> ModelSizes:
        """Of a model that qcli can read."""
        blocks: dict[int, list[Linear]] = {}
        for linear in source.linears():
            blocks.setdefault(linear.block, []).append(linear)
        parts = tuple(f"{path}." for path in source.family.dense_parts)
        sizes = {name: prod(tensor.shape) for name, tensor in source.tensors().items()}
        beside = sum(size for name, size in sizes.items() if name.startswith(parts))
        blocks_at = f"{source.family.blocks}."
        outside = sum(size for name, size in sizes.items() if not name.startswith((blocks_at, *parts)))
        layers = max(blocks.values(), key=_weights)
        inner = max(max(layer.shape) for layer in layers)
        hidden = source.family.passing.width(source.hf_config().get_text_config().hidden_size)
        return cls(layers, outside, beside, hidden, inner)

    @property
    def block(self) -> int:
        """Weights of the linears of the largest block."""
        return _weights(self.layers)

    @property
    def largest(self) -> int:
        """Weights of its largest linear."""
        return max(prod(layer.shape) for layer in self.layers)

    @property
    def joined(self) -> list[tuple[list[str], int]]:
        """The linears as training joins them where their groups are alike: paths, and weights together."""
        weights = {layer.path: prod(layer.shape) for layer in self.layers}
        joined = together((path, None, size) for path, size in weights.items())
        return [(paths, sum(weights[path] for path in paths)) for _, paths in joined]

    def forward(self, tokens: int, itemsize: int) -> int:
        """Bytes of the activations in a pass of `tokens` tokens through a block, gradients aside.

        Args:
            itemsize: of the outputs of linears; hidden states and norms are float32.
        """
        return tokens * (4 * _STATES * self.hidden + itemsize * _INNER * self.inner)


def experts_at_once(width: int) -> int:
    """Number of experts with `width` inputs whose Hessians one pass collects."""
    return max(1, _EXPERT_STATISTICS // (4 * width**2))


def pass_tokens(samples: int, length: int) -> int:
    """Tokens of a pass through a block, for samples of this length (see `stream.batches`)."""
    return length * min(samples, max(1, BATCH_TOKENS // length))


def _weights(layers: list[Linear]) -> int:
    return sum(prod(layer.shape) for layer in layers)

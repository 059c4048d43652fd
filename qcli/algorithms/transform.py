"""The base class of transforms: rewrites of a block that keep its function and make its weights easier to quantize.

A transform is the record of its options. This module and the files of `transforms/` import no torch at the top, so that
recipes are validated in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from qcli.core.weight import Format
from qcli.utils.options import Options
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.algorithms.training.loop import Objective
    from qcli.algorithms.training.outcome import Outcome


class Transform(Options):
    """Trains channel scales that are folded into the weights before they are quantized, at no cost at inference."""

    name: ClassVar[str]

    loss: Literal["block", "kl", "cross-entropy"] = "block"

    @property
    def whole_model(self) -> bool:
        """Whether the loss is one of the model's predictions, so that all blocks are trained together."""
        return self.loss != "block"

    def unsupported_reason(self, format: Format) -> str | None:
        """The reason why layers of `format` cannot be prepared; None if they can."""
        return None

    def fit(
        self,
        weights: Mapping[str, Tensor],
        formats: Mapping[str, Format | None],
        scales: Sequence[ChannelScale],
        objective: Objective,
        progress: Progress = silent,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], Outcome]:
        """Train the values of `scales`; nothing is folded yet.

        Args:
            weights: full-precision weights by path, float32 `[out, in]`.
            formats: the format that each will have, by path; None or missing: it stays dense.
            scales: where channels may be scaled, with index maps on the device of the weights.
            objective: scores effective weights under the paths of `weights`.
            progress: called at the start and after each step.
            dtype: that the objective's linear layers compute in, which effective weights may have; None: float32.

        Returns:
            `alpha` of each scale, float32 `[size]`, and the outcome of the training.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ChannelScale:
    """A scale `alpha` between two modules: the producer's output channels are divided by it and the readers' input
    columns multiplied, which keeps the function.

    Attributes:
        producer: path in the block of a norm or linear.
        readers: paths of all linears that read the producer's outputs.
        outputs: int64 `[producer's outputs]`: index of the alpha of each output channel; -1: it has none.
        inputs: int64 `[readers' inputs]`: index of the alpha of each input column; -1: it has none.
        size: number of alphas.
        norm_offset: what a norm as the producer adds to its weight (Gemma: 1).
        dense: names in the block of matrices `[out, in]` that read the outputs too and are never quantized: a router's.
    """

    producer: str
    readers: tuple[str, ...]
    outputs: Tensor
    inputs: Tensor
    size: int
    norm_offset: float = 0.0
    dense: tuple[str, ...] = ()

    def within(self, prefix: str) -> ChannelScale:
        """The same scale with `prefix` before every path."""
        readers, dense = (tuple(prefix + each for each in names) for names in (self.readers, self.dense))
        return replace(self, producer=prefix + self.producer, readers=readers, dense=dense)

    def per_output(self, alpha: Tensor, default: float = 1.0) -> Tensor:
        """Spread `alpha` `[size]` over the producer's outputs, with `default` where there is none."""
        return _spread(alpha, self.outputs, default)

    def per_input(self, alpha: Tensor) -> Tensor:
        """Spread `alpha` `[size]` over the readers' inputs, with 1 where there is none."""
        return _spread(alpha, self.inputs, 1.0)


def _spread(alpha: Tensor, places: Tensor, default: float) -> Tensor:
    """`alpha` at these places; `default` at -1."""
    import torch

    return torch.cat([alpha, alpha.new_full((1,), default)])[places]

"""What a transform is: a rewrite of a block that leaves its function as it is and its weights easier to quantize.

A transform's validated options are the transform. This module and the files of `transforms/` import no torch at the
top, so that recipes are checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from qcli.core.weight import Format
from qcli.utils.options import Options
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.algorithms.training.loop import Objective
    from qcli.algorithms.training.outcome import Outcome


class Transform(Options):
    """Chooses numbers that can be folded into the weights before any method quantizes them."""

    name: ClassVar[str]

    loss: Literal["block", "kl", "cross-entropy"] = "block"

    @property
    def whole_model(self) -> bool:
        """Whether it is trained for what the model predicts, all blocks together."""
        return self.loss != "block"

    def misfit(self, format: Format) -> str | None:
        """Why layers of `format` cannot be prepared; None when they can."""
        return None

    def fit(
        self,
        weights: Mapping[str, Tensor],
        formats: Mapping[str, Format | None],
        scales: Sequence[ChannelScale],
        objective: Objective,
        progress: Progress = silent,
    ) -> tuple[list[Tensor], Outcome]:
        """Numbers to fold, one tensor for each of `scales`, and how their training went."""
        raise NotImplementedError


@dataclass(frozen=True)
class ChannelScale:
    """Channels between two modules: the producer's are divided by `alpha`, the readers' columns multiplied by it.

    Attributes:
        producer: path of a norm or linear in the block.
        readers: paths of all linears that read the channels.
        outputs: int64 `[outputs of the producer]`: the alpha of each; -1 where it has none.
        inputs: int64 `[inputs of a reader]`: the alpha of each.
        size: number of alphas.
        norm_offset: what the producer, if it is a norm, adds to its weight.
    """

    producer: str
    readers: tuple[str, ...]
    outputs: Tensor
    inputs: Tensor
    size: int
    norm_offset: float = 0.0

    def within(self, prefix: str) -> ChannelScale:
        """The same, with `prefix` before every path."""
        readers = tuple(prefix + reader for reader in self.readers)
        return replace(self, producer=prefix + self.producer, readers=readers)

    def of_outputs(self, alpha: Tensor, without: float = 1.0) -> Tensor:
        """What each output of the producer is divided by; `without` where it has no alpha."""
        import torch

        return torch.cat([alpha, alpha.new_full((1,), without)])[self.outputs]

    def of_inputs(self, alpha: Tensor) -> Tensor:
        """What each column of a reader is multiplied by."""
        return alpha[self.inputs]

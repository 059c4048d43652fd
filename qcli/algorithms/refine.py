"""Reconstruction: jointly optimizes codes and tables to reconstruct the output of a linear or a block.

By block with latent weights it is ZQ-Global of ZeroQuant-V2 (arXiv 2303.08302, section 4) and the first phase of
EfficientQAT (arXiv 2407.11062, section 3.2). By linear it is ZQ-Local; ours reconstructs the full-precision outputs on
quantized inputs and, in linears that write to the residual stream, the error that the stream carries. Written over
`encode` and `decode`, it serves every format. Ours: latents in units of the quantization step and tables in units of
their own size, so that one learning rate fits every layer; a start exactly at the method's codes; the best step
selected on held-out samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import HESSIAN, OUTPUT_GAP
from qcli.core.weight import Format
from qcli.utils.options import Options
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qcli.algorithms.training.loop import Objective
    from qcli.algorithms.training.outcome import Outcome
    from qcli.core.weight import QuantizedWeight


class Refine(Options):
    """Options of the reconstruction that follows the method."""

    scope: Literal["block", "linear"] = Field(
        default="block", description="reconstruct the output of each transformer block, or of each linear"
    )
    steps: int = Field(default=200, ge=1, description="optimizer steps for each block or group of linears")
    train: tuple[Literal["tables", "weights"], ...] = Field(
        default=("tables", "weights"),
        strict=False,
        description="what is trained: scales and zero points, the latent weights behind the codes, or both",
    )
    tables_lr: float = Field(default=1e-3, gt=0, description="learning rate of tables, relative to their size")
    weights_lr: float = Field(default=1e-2, gt=0, description="learning rate of latent weights, in quantization steps")
    batch_tokens: int = Field(default=1024, ge=1, description="tokens per step; at least one sample")

    @model_validator(mode="after")
    def _trains_something(self) -> Refine:
        if not self.train:
            raise ValueError("train must name tables, weights or both")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """The statistics of `LinearGroup` that are read, besides the method's."""
        return frozenset({HESSIAN, OUTPUT_GAP}) if self.scope == "linear" else frozenset()

    def unsupported_reason(self, format: Format) -> str | None:
        """The reason why layers of `format` cannot be reconstructed; None if they can."""
        if self.scope == "linear" and format.has_output_norm:
            return "scope linear fits outputs without the norm that follows these layers: set scope to block"
        if "weights" not in self.train and not format.trains_tables:
            return f"the tables of {format.name} cannot be trained: set train to [tables, weights]"
        return None

    def bytes_per_weight(self, itemsize: int) -> int:
        """Estimated bytes that training keeps of each weight while others are rounded.

        Args:
            itemsize: of the dense weights that are scored.
        """
        return 17 + itemsize if "weights" in self.train else 5 + itemsize

    def refine(
        self,
        weights: Mapping[str, QuantizedWeight],
        targets: dict[str, Tensor],
        objective: Objective,
        progress: Progress = silent,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, QuantizedWeight], Outcome]:
        """Train the weights of one objective jointly.

        Args:
            weights: as the method quantized them, by path.
            targets: float32 `[out, in]`, by path, on any device: the weights the codes were fitted to; latents start
                as near to them as the codes allow. Taken: the mapping is empty afterwards.
            objective: scores dense weights under the same paths.
            progress: called at the start and after each step.
            dtype: of the dense weights that are scored; None: float32.

        Returns:
            Weights in the same formats, the given ones if no step improved on them; and the outcome of the training.
        """
        import torch

        from qcli.algorithms.training.loop import Schedule, train
        from qcli.algorithms.training.trainable_weight import TrainableWeights, parameter_groups

        layers = TrainableWeights(weights, targets, self.train)
        targets.clear()  # of a whole block they are as large as its latents
        outcome = train(
            parameter_groups([layers], tables_lr=self.tables_lr, weights_lr=self.weights_lr),
            lambda as_stored: layers.dense(as_stored=as_stored, dtype=dtype or torch.float32),
            objective,
            Schedule(self.steps),
            progress=progress,
        )
        if outcome.best_step == 0:
            return dict(weights), outcome
        return layers.quantized(), outcome

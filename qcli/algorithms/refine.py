"""Reconstruction: tune codes and tables so that a linear's or a block's output comes back.

Block-wise with latent weights it is ZeroQuant-V2's ZQ-Global (arXiv 2303.08302, section 4) and EfficientQAT's first
phase (arXiv 2407.11062, section 3.2); linear by linear it is ZQ-Local, except that ours asks for the full-precision
outputs on quantized inputs and, where a linear writes to the residual stream, for what that has lost. Written over
`encode` and `decode`, it serves every format. Ours: latents in units of the quantization step and tables relative to
themselves, so that one rate fits every layer; a start exactly at the codes the method chose; the best step chosen on
samples that nothing was fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from qcli.algorithms.layer_group import CROSS, HESSIAN, RESIDUAL_CROSS
from qcli.core.weight import Format
from qcli.utils.options import Options
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.algorithms.training.loop import Objective
    from qcli.algorithms.training.outcome import Outcome
    from qcli.core.weight import QuantizedWeight


class Refine(Options):
    """Options of the reconstruction that follows the method."""

    scope: Literal["block", "linear"] = Field(
        default="block", description="whose output is reconstructed: each transformer block's, or each linear's"
    )
    steps: int = Field(default=200, ge=1, description="of the optimizer, for each block or group of linears")
    train: tuple[Literal["tables", "weights"], ...] = Field(
        default=("tables", "weights"),
        strict=False,
        description="scales and zero points, and the weights behind the codes",
    )
    tables_lr: float = Field(default=1e-3, gt=0, description="learning rate of tables, relative to their size")
    weights_lr: float = Field(default=1e-2, gt=0, description="learning rate of weights, in quantization steps")
    batch_tokens: int = Field(default=1024, ge=1, description="tokens of a step, at least one sample")

    @model_validator(mode="after")
    def _something(self) -> Refine:
        if not self.train:
            raise ValueError("train must name tables, weights or both")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Moments that reconstruction reads besides the method's."""
        return frozenset({HESSIAN, CROSS, RESIDUAL_CROSS}) if self.scope == "linear" else frozenset()

    def misfit(self, format: Format) -> str | None:
        """Why layers of `format` cannot be tuned; None when they can."""
        if self.scope == "linear" and format.has_output_norm:
            return "scope linear compares what weights give, but a norm follows these layers: set scope to block"
        return None

    def refine(
        self,
        weights: Mapping[str, QuantizedWeight],
        targets: Mapping[str, Tensor],
        objective: Objective,
        progress: Progress = silent,
    ) -> tuple[dict[str, QuantizedWeight], Outcome]:
        """Train the weights of one objective together.

        Args:
            weights: as the method left them, by path.
            targets: float32 `[out, in]`: what each one's codes were fitted to; latents start as near to it as the
                codes allow.
            objective: judges dense weights by the same paths.

        Returns:
            New weights of the same formats, or the given ones where nothing better was found; and how it went.
        """
        from qcli.algorithms.training.loop import Schedule, train
        from qcli.algorithms.training.trainable_weight import TrainableWeight, parameter_groups

        layers = {path: TrainableWeight(weight, targets[path], self.train) for path, weight in weights.items()}
        outcome = train(
            parameter_groups(layers.values(), tables_lr=self.tables_lr, weights_lr=self.weights_lr),
            lambda as_stored: {path: layer.dense(as_stored=as_stored) for path, layer in layers.items()},
            objective,
            Schedule(self.steps),
            progress=progress,
        )
        if outcome.best_step == 0:
            return dict(weights), outcome
        return {path: layer.quantized() for path, layer in layers.items()}, outcome

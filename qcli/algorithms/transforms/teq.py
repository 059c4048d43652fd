"""TEQ: trainable equivalent transformation (arXiv 2310.10944).

`y = (x / alpha) Q(W * alpha)^T + b` with one trained `alpha` per input channel, shared by all linears that read it.
Division by alpha is folded into the module that produces the channel, multiplication into the weights: no cost at
inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qcli.algorithms.transform import ChannelScale, Transform
from qcli.core.formats._grouped import Grouped
from qcli.core.formats.affine import Affine
from qcli.core.weight import Format
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from qcli.algorithms.training.loop import Objective
    from qcli.algorithms.training.outcome import Outcome

__all__ = ["TEQ"]


class TEQ(Transform):
    """Trainable equivalent transformation.

    The paper's: rounding to nearest on min-max grids in the forward pass, the number of steps, Adam's betas. Ours:
    `alpha = exp(theta)`, which stays positive; cosine decay of the learning rate; the best held-out step is kept, the
    start included; and gradients through the range of each group (`gradient`). The paper's straight-through gradients
    take rounding errors as constants, so they also pull along a common factor of all columns of a group, which changes
    nothing. Codebooks are represented by min-max grids of the same groups.
    """

    name: ClassVar[str] = "teq"

    loss: Literal["block", "kl", "cross-entropy"] = Field(
        default="block",
        description="what is minimized: the error of each block's output; or the whole model's KL divergence from the "
        "full-precision model, or its cross-entropy on the text (the paper's)",
    )
    gradient: Literal["range", "straight-through"] = Field(
        default="range",
        description="rounding errors scale with the range of their group, or are constants (the paper's)",
    )
    steps: int = Field(default=1000, ge=0, description="optimizer steps")
    lr: float = Field(default=1e-2, gt=0, description="learning rate of log(alpha); 0.001 in the paper")

    def unsupported_reason(self, format: Format) -> str | None:
        if _uniform(format) is None:
            return f"teq cannot prepare layers of the {format.name} format: it trains through rounding on uniform grids"
        return None

    def fit(
        self,
        weights: Mapping[str, Tensor],
        formats: Mapping[str, Format | None],
        scales: Sequence[ChannelScale],
        objective: Objective,
        progress: Progress = silent,
    ) -> tuple[list[Tensor], Outcome]:
        """Train the alphas in the basis of the original weights (see `Transform.fit`).

        To the rest of the model a transformed linear is `Q(W * alpha_in / alpha_out) * alpha_out / alpha_in`, whatever
        is folded into the modules between. Scales whose readers all stay dense keep alpha = 1.
        """
        import torch

        from qcli.algorithms.training.loop import Schedule, train
        from qcli.algorithms.training.outcome import Outcome

        transformed = _Transformed(weights, formats, scales, through_range=self.gradient == "range")
        if transformed.trained:
            schedule = Schedule(self.steps, betas=(0.9, 0.9), floor=0.0)
            group = {"params": transformed.trained, "lr": self.lr}
            outcome = train([group], transformed.effective, objective, schedule, progress=progress)
        else:
            with torch.no_grad():
                loss = objective.held_out(transformed.effective(True))
            outcome = Outcome(loss, loss, best_step=0, steps=0)
        return [theta.detach().exp() for theta in transformed.thetas], outcome


class _Transformed:
    """Effective weights of linears as functions of `theta = log(alpha)`.

    Args:
        weights, formats, scales: as for `Transform.fit`.
        through_range: whether gradients pass through the range of each group.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        formats: Mapping[str, Format | None],
        scales: Sequence[ChannelScale],
        *,
        through_range: bool,
    ) -> None:
        import torch

        self.weights, self.scales, self.through_range = weights, scales, through_range
        grids = {path: _uniform(format) for path, format in formats.items() if format is not None}
        self.grids = {path: grid for path, grid in grids.items() if grid is not None}
        device = next(iter(weights.values())).device
        self.thetas = [torch.zeros(scale.size, device=device, requires_grad=True) for scale in scales]
        self.trained = [
            theta
            for theta, scale in zip(self.thetas, scales, strict=True)
            if any(reader in self.grids for reader in scale.readers)
        ]

    def effective(self, as_stored: bool) -> dict[str, Tensor]:
        """All weights by path, quantized ones rounded; `as_stored` makes no difference."""
        return {
            path: self._rounded(path, self.grids[path]) if path in self.grids else weight
            for path, weight in self.weights.items()
        }

    def _rounded(self, path: str, format: Affine) -> Tensor:
        """`Q(V) * alpha_out / alpha_in` with `V = W * alpha_in / alpha_out`.

        With `Q(V) = V + error` this is `W + error * alpha_out / alpha_in`. Straight through, the error is a constant;
        through the range, it is proportional to the step of its grid, hence to the range of its group.
        """
        import torch

        from qcli.algorithms.solvers import grid

        weight = self.weights[path]
        log_in, log_out = self._log_alphas(path)
        scaled = weight * (log_in - log_out[:, None]).exp()
        with torch.no_grad():
            error = format.decode(*grid.round_to_minmax(scaled, format)) - scaled
        if self.through_range:
            span = _group_range(scaled, format)
            error = error * format.spread(span / span.detach(), weight.shape[1])
        return torch.addcmul(weight, error, (log_out[:, None] - log_in).exp())

    def _log_alphas(self, path: str) -> tuple[Tensor, Tensor]:
        """`log(alpha_in)` `[in]` and `log(alpha_out)` `[out]` of a linear."""
        weight = self.weights[path]
        log_in, log_out = weight.new_zeros(weight.shape[1]), weight.new_zeros(weight.shape[0])
        for theta, scale in zip(self.thetas, self.scales, strict=True):
            if path in scale.readers:
                log_in = scale.per_input(theta)
            if path == scale.producer:
                log_out = scale.per_output(theta, default=0.0)
        return log_in, log_out


def _group_range(weight: Tensor, format: Affine) -> Tensor:
    """The range of each group, to which its grid's step is proportional, `[out, groups]`; 1 for groups of zeros."""
    groups = format.grouped(weight)
    if format.zero_point == "none":
        span = groups.abs().amax(-1)
    else:
        span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    return span.where(span > 0, 1.0)


def _uniform(format: Format) -> Affine | None:
    """The uniform grids that represent a format with groups; None for other formats."""
    if isinstance(format, Affine):
        return format
    if isinstance(format, Grouped):
        return Affine(bits=format.bits, group_size=format.group_size, zero_point="float")
    return None

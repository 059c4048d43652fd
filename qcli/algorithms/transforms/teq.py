"""TEQ: train how much of each channel's size lies in a weight's columns and how much in what produces its inputs.

arXiv 2310.10944: `y = (x / alpha) Q(W * alpha)^T + b` with one `alpha` per input channel, shared by all linears that
read it; the module before is divided by it, so nothing is left at inference.
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

    The paper's: rounding to nearest on min-max grids, the number of steps, Adam's betas. Ours: `alpha = exp(theta)`
    stays positive, the rate falls by a cosine, the best step on held-out samples is kept and the untransformed block
    is one of them, and gradients that know that an alpha widens the grid of its whole group. The paper's
    straight-through ones take all other errors as given: they pull even at one factor for all columns of a group,
    which changes nothing. Codebooks are stood in for by min-max grids of the same groups.
    """

    name: ClassVar[str] = "teq"

    loss: Literal["block", "kl", "cross-entropy"] = Field(
        default="block",
        description="what is trained for: each block's output, or the whole model's predictions against the "
        "full-precision model's (kl) or the text (cross-entropy, the paper's)",
    )
    gradient: Literal["range", "straight-through"] = Field(
        default="range",
        description="how rounding errors depend on alpha: through the range of their group too, or not (the paper's)",
    )
    steps: int = Field(default=1000, ge=0, description="optimizer steps")
    lr: float = Field(default=1e-2, gt=0, description="learning rate of log(alpha); the paper's is 0.001")

    def misfit(self, format: Format) -> str | None:
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
        """Train the alphas of `scales`, in the basis of the original weights; nothing is folded yet.

        What the rest of the model sees of a transformed linear is
        `Q(W * alpha_in / alpha_out) * alpha_out / alpha_in`, whatever is done to the modules between.

        Args:
            weights: float32 `[out, in]` by path, original values.
            formats: by path; None: the layer stays dense. Layers that are missing count as dense.
            scales: index maps on the device of the weights.
            objective: judges effective weights of all of `weights`.

        Returns:
            float32 `[size]` alphas, one tensor a scale, and how the training went. Scales that touch no quantized
            layer's columns stay 1.
        """
        import torch

        from qcli.algorithms.training.loop import Schedule, train
        from qcli.algorithms.training.outcome import Outcome

        block = _Transformed(weights, formats, scales, through_range=self.gradient == "range")
        if block.trained:
            schedule = Schedule(self.steps, betas=(0.9, 0.9), floor=0.0)
            group = {"params": block.trained, "lr": self.lr}
            outcome = train([group], block.effective, objective, schedule, progress=progress)
        else:
            with torch.no_grad():
                loss = objective.held_out(block.effective(True))
            outcome = Outcome(loss, loss, best_step=0, steps=0)
        return [theta.detach().exp() for theta in block.thetas], outcome


class _Transformed:
    """Effective weights of linears as functions of `theta = log(alpha)`."""

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
        self.formats = {path: grid for path, grid in grids.items() if grid is not None}
        device = next(iter(weights.values())).device
        self.thetas = [torch.zeros(scale.size, device=device, requires_grad=True) for scale in scales]
        self.trained = [
            theta
            for theta, scale in zip(self.thetas, scales, strict=True)
            if any(reader in self.formats for reader in scale.readers)
        ]

    def effective(self, as_stored: bool) -> dict[str, Tensor]:
        """By path; `as_stored` makes no difference, since rounding is what is trained through."""
        return {
            path: self._rounded(path, self.formats[path]) if path in self.formats else weight
            for path, weight in self.weights.items()
        }

    def _rounded(self, path: str, format: Affine) -> Tensor:
        """`Q(V) * alpha_out / alpha_in` with `V = W * alpha_in / alpha_out`.

        With `Q(V) = V + error` this is `W + error * alpha_out / alpha_in`: straight through means that the error has
        no gradient. But an error is a share of its grid's step, which is a share of its group's range.
        """
        import torch

        from qcli.algorithms.solvers import grid

        weight = self.weights[path]
        columns, rows = self._log_scales(path)
        scaled = weight * (columns - rows[:, None]).exp()
        with torch.no_grad():
            error = format.decode(*grid.round_to_minmax(scaled, format)) - scaled
        if self.through_range:
            span = _range(scaled, format)
            error = error * format.spread(span / span.detach(), weight.shape[1])
        return torch.addcmul(weight, error, (rows[:, None] - columns).exp())

    def _log_scales(self, path: str) -> tuple[Tensor, Tensor]:
        """`log(alpha_in)` `[in]` and `log(alpha_out)` `[out]` of a linear."""
        weight = self.weights[path]
        columns, rows = weight.new_zeros(weight.shape[1]), weight.new_zeros(weight.shape[0])
        for theta, scale in zip(self.thetas, self.scales, strict=True):
            if path in scale.readers:
                columns = scale.of_inputs(theta)
            if path == scale.producer:
                rows = scale.of_outputs(theta, without=0.0)
        return columns, rows


def _range(weight: Tensor, format: Affine) -> Tensor:
    """What each group's step is proportional to, `[out, groups]`; 1 for groups of zeros."""
    groups = format.grouped(weight)
    if format.zero_point == "none":
        span = groups.abs().amax(-1)
    else:
        span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    return span.where(span > 0, 1.0)


def _uniform(format: Format) -> Affine | None:
    """The grids that stand in for a format with tables for each group; None for other formats."""
    if isinstance(format, Affine):
        return format
    if isinstance(format, Grouped):
        return Affine(bits=format.bits, group_size=format.group_size, zero_point="float")
    return None

"""TEQ: trainable equivalent transformation (arXiv 2310.10944).

`y = (x / alpha) Q(W * alpha)^T + b` with one trained `alpha` per input channel, shared by all linears that read it.
Division by alpha is folded into the module that produces the channel, multiplication into the weights: no cost at
inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from qcli.algorithms.transform import ChannelScale, Transform
from qcli.core.formats._grouped import Grouped
from qcli.core.formats.affine import Affine
from qcli.core.weight import Format
from qcli.utils.progress import Progress, silent

if TYPE_CHECKING:
    import torch
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
        dtype: torch.dtype | None = None,
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
            effective = partial(transformed.effective, dtype=dtype)
            outcome = train([group], effective, objective, schedule, progress=progress)
        else:
            with torch.no_grad():
                loss = objective.held_out(transformed.effective(True))
            outcome = Outcome(loss, loss, best_step=0, steps=0)
        return [theta.detach().exp() for theta in transformed.thetas], outcome


class _Transformed:
    """Effective weights of linears as functions of `theta = log(alpha)`.

    To the rest of the model a transformed linear is `Q(V) * alpha_out / alpha_in` with `V = W * alpha_in / alpha_out`
    (see `training.scaled_rounding`). Small linears whose groups are alike are one weight, with a group in each row.

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

        from qcli.algorithms.solvers.tiles import together

        self.weights = weights
        grids = {path: _uniform(format) for path, format in formats.items() if format is not None}
        self.grids = {path: grid for path, grid in grids.items() if grid is not None}
        device = next(iter(weights.values())).device
        self.thetas = [torch.zeros(scale.size, device=device, requires_grad=True) for scale in scales]
        self.trained = [
            theta
            for theta, scale in zip(self.thetas, scales, strict=True)
            if any(reader in self.grids for reader in scale.readers)
        ]
        self.none = torch.zeros(1, device=device)  # what channels without a scale have
        kinds = {
            path: (grid.model_copy(update={"group_size": -1}), grid.group_width(weights[path].shape[1]))
            for path, grid in self.grids.items()
        }
        sizes = ((path, kind, weights[path].numel()) for path, kind in kinds.items())
        self.parts = [
            _Together({path: weights[path] for path in paths}, self.grids, kinds[paths[0]][0], scales, through_range)
            for _, paths in together(sizes)
        ]

    def effective(self, as_stored: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All weights by path, quantized ones rounded; `as_stored` makes no difference.

        Args:
            dtype: of rounded weights; None: float32.
        """
        import torch

        rounded: dict[str, Tensor] = {}
        thetas = torch.cat([*self.thetas, self.none])
        for part in self.parts:
            rounded |= part.effective(thetas, dtype or torch.float32)
        return {path: rounded.get(path, weight) for path, weight in self.weights.items()}


class _Together:
    """Linears whose groups are alike.

    Args:
        weights: float32 `[out, in]`, by path.
        grids: the format of each, by path.
        format: of rows that are groups.
        scales, through_range: as for `_Transformed`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        grids: Mapping[str, Affine],
        format: Affine,
        scales: Sequence[ChannelScale],
        through_range: bool,
    ) -> None:
        import torch

        from qcli.algorithms.training.scaled_rounding import Rounding

        self.grids, self.shapes = grids, {path: (weight.shape[0], weight.shape[1]) for path, weight in weights.items()}
        as_rows = [grids[path].values_as_rows(weight) for path, weight in weights.items()]
        weight = torch.cat(as_rows) if len(as_rows) > 1 else as_rows[0]
        inputs, places, outputs = [], [], []  # of thetas: for each input of a linear; of those, and of outputs, by row
        seen, indices = 0, _ThetaIndices(scales)
        for path, (rows, columns) in self.shapes.items():
            of_inputs, of_outputs = indices.of(path, (rows, columns), weight.device)
            inputs.append(grids[path].values_as_rows(of_inputs[None]))
            groups = len(inputs[-1])
            places.append(torch.arange(seen, seen + groups, device=weight.device).repeat(rows))
            outputs.append(of_outputs.repeat_interleave(groups))
            seen += groups
        self.inputs, self.outputs = torch.cat(inputs), torch.cat(outputs)
        self.rows = [len(place) for place in places]
        self.rounding = Rounding(weight, torch.cat(places), format, through_range)

    def effective(self, thetas: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The effective weights by path.

        Args:
            thetas: of all scales in turn, and a last one that is 0.
            dtype: of the weights.
        """
        from qcli.algorithms.training.scaled_rounding import scaled_rounding

        log_in = thetas.index_select(0, self.inputs.flatten()).view(self.inputs.shape)
        effective = scaled_rounding(self.rounding, log_in, thetas.index_select(0, self.outputs), dtype)
        return {
            path: self.grids[path].values_from_rows(rows, shape)
            for (path, shape), rows in zip(self.shapes.items(), effective.split(self.rows), strict=True)
        }


class _ThetaIndices:
    """Which of all thetas, in turn, is the `log(alpha)` of each input and of each output of a linear."""

    def __init__(self, scales: Sequence[ChannelScale]) -> None:
        self.read: dict[str, list[tuple[ChannelScale, int]]] = {}  # by reader: scales, and where their thetas start
        self.produced: dict[str, tuple[ChannelScale, int]] = {}
        self.none = 0  # the one after the last
        for scale in scales:
            for reader in scale.readers:
                self.read.setdefault(reader, []).append((scale, self.none))
            self.produced[scale.producer] = scale, self.none
            self.none += scale.size

    def of(self, path: str, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 `[in]` and `[out]`; the one after the last theta where there is none."""
        import torch

        outputs, inputs = (torch.full((size,), self.none, device=device) for size in shape)
        for scale, first in self.read.get(path, ()):
            inputs = torch.where(scale.inputs < 0, inputs, scale.inputs + first)
        if path in self.produced:
            scale, first = self.produced[path]
            outputs = torch.where(scale.outputs < 0, outputs, scale.outputs + first)
        return inputs, outputs


def _uniform(format: Format) -> Affine | None:
    """The uniform grids that represent a format with groups; None for other formats."""
    if isinstance(format, Affine):
        return format
    if isinstance(format, Grouped):
        return Affine(bits=format.bits, group_size=format.group_size, zero_point="float")
    return None

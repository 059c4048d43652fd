"""The loss curve of a distillation; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcli.algorithms.training.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE = "#1f5fa8", "#c2641d"


def plot_training(outcome: Outcome, measure: str, blocks: Sequence[Outcome], file: Path) -> None:
    """Draw losses by step, or by block if there are `blocks`; a PNG, the same bytes for the same outcomes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    if blocks:
        _draw_blocks(axes, blocks)
    else:
        _draw_steps(axes, outcome)
    axes.set_title(
        f"held-out {measure}: {outcome.before:.4g} -> {outcome.after:.4g} nats per token", loc="left", fontsize=10
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False)
    figure.savefig(file, metadata={"Software": None})


def _draw_steps(axes: Axes, outcome: Outcome) -> None:
    evaluated = [(step, held_out) for step, _, held_out in outcome.curve if held_out is not None]
    trained = [(step, loss) for step, loss, _ in outcome.curve if loss is not None]
    axes.plot(*zip(*evaluated, strict=True), color=_BLUE, marker="o", markersize=3.5, label="held-out")
    if trained:
        axes.plot(*zip(*trained, strict=True), color=_ORANGE, linewidth=1, label="training, mean since the last")
    axes.axvline(outcome.best_step, color="#888888", linewidth=0.8, linestyle=":", label="kept")
    axes.set(xlabel="steps", ylabel="nats per token", ylim=(0, None))


def _draw_blocks(axes: Axes, blocks: Sequence[Outcome]) -> None:
    numbers = range(len(blocks))
    axes.plot(numbers, [block.before for block in blocks], color=_ORANGE, marker="o", markersize=3.5, label="before")
    axes.plot(numbers, [block.after for block in blocks], color=_BLUE, marker="o", markersize=3.5, label="after")
    axes.set(xlabel="block", ylabel="relative error of its output; of the last one KL", yscale="log")

"""Speeds of models as a figure; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcli.utils.figures import label, rendered

_COLOURS = ("#1f5fa8", "#c2641d")
_MEASURES = {
    "decode_tokens_per_second": "decode, tokens/s",
    "prefill_tokens_per_second": "prefill, tokens/s",
    "first_token_seconds": "first token, s",
}


def plot_speeds(result: Mapping[str, Any], kind: str) -> bytes:
    """Bars by batch size and context, for decoding, prefill, the first token, and memory.

    Args:
        result: as `bench` returns it.
        kind: one of `qcli.utils.figures.KINDS`.
    """
    from matplotlib.figure import Figure

    arms = [arm for arm in ("model", "baseline") if result[arm] is not None]
    names = [label(Path(result[arm]["name"]).name) for arm in arms]
    points = [f"{point['batch']} x {point['context']}" for point in result["points"]]
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    width = 0.8 / len(arms)
    for axes, (measure, words) in zip(panels, _MEASURES.items(), strict=False):
        for number, (arm, name) in enumerate(zip(arms, names, strict=True)):
            places = [index + number * width for index in range(len(points))]
            heights = [point[arm][measure] for point in result["points"]]
            axes.bar(places, heights, width, color=_COLOURS[number], label=name)
        axes.set_xticks([index + width * (len(arms) - 1) / 2 for index in range(len(points))], points)
        axes.set(xlabel="sequences x context", ylabel=words)
    memory = panels[3]
    for number, arm in enumerate(arms):
        held = result[arm]
        peak = next(reversed(held["peak"]["run"].values()), 0)  # of the GPU, where there is one
        memory.bar(
            [number * width, 1 + number * width], [held["tensors"] / 1e9, peak / 1e9], width, color=_COLOURS[number]
        )
    memory.set_xticks([width * (len(arms) - 1) / 2 + index for index in range(2)], ["weights", "peak"])
    memory.set(ylabel="memory, GB")
    for axes in panels:
        axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=2)
    return rendered(figure, kind)

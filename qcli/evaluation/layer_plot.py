"""Numbers of layers as a figure: means by block, and every layer of every block. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli.utils.figures import label, plain_ticks, rendered
from qcli.utils.text import with_wildcards

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#1f5fa8", "#c2641d", "#3a8a4d", "#7a4fa3")
_MARKS = "osD^"


def plot_errors(blocks: Sequence[Mapping[str, Any]], model: str, baseline: str, kind: str) -> bytes:
    """Errors of blocks and layers.

    Args:
        blocks: `BlockErrors` as mappings.
        model: its name, and the baseline's, for the title.
        kind: one of `qcli.utils.figures.KINDS`.
    """
    lines = {
        "accumulated: of its output in the model": [block["accumulated"] for block in blocks],
        "own: on the baseline's inputs": [block["own"] for block in blocks],
    }
    return draw(
        f"{model}, compared with {baseline}",
        "relative squared error of a block",
        lines,
        "error of each layer's output",
        [block["layers"] for block in blocks],
        kind,
    )


def draw(
    title: str,
    measure: str,
    lines: Mapping[str, Sequence[float]],
    cells: str,
    layers: Sequence[Mapping[str, float]],
    kind: str,
) -> bytes:
    """Lines by block above; below a map of all layers, of which experts of a block share a cell.

    Args:
        measure: what the lines show, by their names in `lines`, a number for each block.
        cells: what the numbers of `layers` are; for each block, by path in it. Those of 0 are left white.
        kind: one of `qcli.utils.figures.KINDS`.
    """
    from matplotlib.figure import Figure

    means = [_means(block) for block in layers]
    kinds = list(dict.fromkeys(path for block in means for path in block))
    height = 0.24 * len(kinds)
    figure = Figure(figsize=(9, 4.4 + height), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, height))
    for number, (name, values) in enumerate(lines.items()):
        colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
        upper.plot(range(len(values)), values, color=colour, marker=mark, markersize=4, linewidth=1.2, label=name)
    upper.set_ylabel(measure)
    if any(value > 0 for values in lines.values() for value in values):
        upper.set_yscale("log")
        plain_ticks(upper.yaxis)
    upper.grid(axis="y", linewidth=0.4, alpha=0.6)
    figure.legend(
        loc="outside upper left", title=label(title), alignment="left", ncols=len(lines), fontsize=9, frameon=False
    )
    for side in ("top", "right"):
        upper.spines[side].set_visible(False)
    _draw_map(lower, kinds, means, cells)
    return rendered(figure, kind)


def _draw_map(axes: Axes, kinds: Sequence[str], means: Sequence[Mapping[str, float]], cells: str) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    known = [value for block in means for value in block.values() if value > 0]
    grid = [[block.get(kind, 0.0) or float("nan") for block in means] for kind in kinds]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else 2 * low)
    drawn = axes.imshow(grid, aspect="auto", cmap="YlOrRd", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(kinds)), [label(kind) for kind in kinds], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("block")
    plain_ticks(axes.figure.colorbar(drawn, ax=axes, label=cells, pad=0.01).ax.yaxis)


def _means(block: Mapping[str, float]) -> dict[str, float]:
    """Means over layers whose paths differ in numbers alone, such as experts."""
    kinds: dict[str, list[float]] = {}
    for path, value in block.items():
        kinds.setdefault(with_wildcards(path), []).append(value)
    return {kind: sum(values) / len(values) for kind, values in kinds.items()}

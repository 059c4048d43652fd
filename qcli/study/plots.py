"""Pictures of a study, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcli.study.findings import Finding, method_of

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_MARKS = "osD^v<>PX*hd"


def plot_front(found: Sequence[Finding], front: Sequence[Finding]) -> bytes:
    """Bits per weight against KL and against perplexity, and the Pareto front by KL.

    A method has a colour, what follows or precedes it a shape.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    runs: dict[tuple[str, str], list[Finding]] = {}
    for each in found:
        if each.kl is not None and each.kl > 0 and each.perplexity is not None:
            runs.setdefault((method_of(each.row["point"]), _steps(each)), []).append(each)
    colours, marks = (sorted({names[i] for names in runs}) for i in (0, 1))
    for (method, steps), members in sorted(runs.items()):
        mark = {
            "marker": _MARKS[(marks.index(steps) + colours.index(method) // 10) % len(_MARKS)],
            "color": f"C{colours.index(method) % 10}",
            "s": 30,
            "label": _text(method + steps),
        }
        bits = [each.bits for each in members]
        upper.scatter(bits, [each.kl for each in members], **mark)
        lower.scatter(bits, [each.perplexity for each in members], **mark)
    line = [each for each in front if each.kl and each.perplexity is not None]
    bits = [each.bits for each in line]
    upper.plot(bits, [each.kl for each in line], color="0.3", linewidth=1, zorder=0)
    lower.plot(bits, [each.perplexity for each in line], color="0.3", linewidth=1, zorder=0)
    upper.set(ylabel="KL to full precision, nats per token", yscale="log")
    lower.set(xlabel="bits per weight, tables counted", ylabel="perplexity", yscale="log")
    for axes in (upper, lower):
        _number(axes.yaxis)
        axes.grid(which="both", alpha=0.25)
    upper.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _png(figure)


def plot_gains(pairs: Sequence[tuple[Finding, Finding]], axis: str) -> bytes:
    """KL without against KL with: below the diagonal, the axis pays."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    before, after = ([max(pair[i].kl or 0, 1e-6) for pair in pairs] for i in (0, 1))
    low, high = min(before + after) / 1.2, max(before + after) * 1.2
    axes.plot([low, high], [low, high], color="0.6", linewidth=1)
    values: dict[str, list[int]] = {}
    for number, (_, changed) in enumerate(pairs):
        values.setdefault(str(changed.row["point"][axis]), []).append(number)
    for place, (value, members) in enumerate(values.items()):
        off, on = ([side[number] for number in members] for side in (before, after))
        axes.scatter(off, on, s=28, marker=_MARKS[place % len(_MARKS)], label=_text(value))
    axes.legend(fontsize=8, loc="upper left")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="KL without",
        ylabel=_text(f"KL with {axis}"),
        xlim=(low, high),
        ylim=(low, high),
    )
    _number(axes.xaxis)
    _number(axes.yaxis)
    axes.grid(which="both", alpha=0.25)
    return _png(figure)


def _number(axis: Axis) -> None:
    """Tick a logarithmic axis in figures for people: at 1, 2 and 5 where there is room."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _steps(each: Finding) -> str:
    """What follows or precedes the method, as ` + ZQ-Local + LoRC`."""
    point = each.row["point"]
    extra = {axis: point.get(axis) for axis in ("transforms", "refine", "low_rank", "activations", "distill")}
    named = [value if isinstance(value, str) else axis for axis, value in extra.items() if value]
    return "".join(f" + {name}" for name in named)


def _text(words: str) -> str:
    """Names are no formulas."""
    return words.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()

"""Figures of a study, as PNG; they need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcli.evaluation.severity import KL_WORDS
from qcli.study.findings import Finding, group_size, method_name
from qcli.utils.figures import label, plain_ticks, rendered

_MARKS = "osD^v<>PX*hd"


def plot_front(
    runs: Sequence[Finding], by_kl: Sequence[Finding], by_perplexity: Sequence[Finding], full_precision: float | None
) -> bytes:
    """Bits per weight against KL and against perplexity, each with its own Pareto front.

    Colours stand for methods, marker shapes for what runs before or after them; numbers beside points are group sizes.

    Args:
        by_kl: the front by KL.
        by_perplexity: the front by perplexity.
        full_precision: the baseline's mean perplexity.
    """
    from matplotlib.figure import Figure

    shown = [run for run in runs if run.kl is not None and run.kl > 0 and run.perplexity is not None]
    series: dict[tuple[str, str], list[Finding]] = {}
    for run in shown:
        series.setdefault((method_name(run.row["point"]), _steps(run)), []).append(run)
    columns = min(4, len(series) or 1)
    figure = Figure(figsize=(10, 9 + 0.2 * -(-len(series) // columns)), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    colours, marks = (sorted({names[i] for names in series}) for i in (0, 1))
    for (method, steps), members in sorted(series.items()):
        mark = {
            "marker": _MARKS[(marks.index(steps) + colours.index(method) // 10) % len(_MARKS)],
            "color": f"C{colours.index(method) % 10}",
            "s": 30,
            "label": label(method + steps),
        }
        bits = [run.bits for run in members]
        upper.scatter(bits, [run.kl for run in members], **mark)
        lower.scatter(bits, [run.perplexity for run in members], **mark)
    for axes, line, value in ((upper, by_kl, _kl), (lower, by_perplexity, _perplexity)):
        front = [run for run in line if run in shown]
        axes.plot([run.bits for run in front], [value(run) for run in front], color="0.3", linewidth=1, zorder=0)
        for run in shown:
            if (size := group_size(run.row["point"])) is not None:
                where = {"xytext": (4, 2), "textcoords": "offset points"}
                axes.annotate(size, (run.bits, value(run)), fontsize=6, color="0.35", **where)
    scale = "log" if shown else "linear"  # no logarithmic axis without a number
    upper.set(ylabel="KL to full precision, nats per token", yscale=scale)
    lower.set(xlabel="bits per weight, tables counted", ylabel="perplexity", yscale=scale)
    inside: dict[str, Any] = {"fontsize": 8, "color": "0.35", "ha": "right", "va": "bottom", "zorder": 0}
    low, high = upper.get_ylim() if shown else (0.0, 0.0)
    for limit, word in KL_WORDS[:-1]:
        if low < limit < high:
            upper.axhline(limit, color="0.35", linewidth=0.8, linestyle=":")
            upper.text(0.995, limit, f"{word} below", transform=upper.get_yaxis_transform(), **{**inside, "va": "top"})
    if full_precision is not None:
        lower.axhline(full_precision, color="0.35", linewidth=0.8, linestyle="--")
        words = f"full precision {full_precision:.4g}"
        lower.text(0.995, full_precision, words, transform=lower.get_yaxis_transform(), **inside)
    for axes in (upper, lower):
        if shown:
            plain_ticks(axes.yaxis)
        axes.grid(which="both", alpha=0.25)
    figure.legend(
        *upper.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )
    return rendered(figure)


def plot_gains(pairs: Sequence[tuple[Finding, Finding]], axis: str) -> bytes:
    """KL without a value on the axis against KL with one: below the diagonal, it helps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    before, after = ([max(pair[i].kl or 0, 1e-6) for pair in pairs] for i in (0, 1))
    low, high = min(before + after) / 1.2, max(before + after) * 1.2
    axes.plot([low, high], [low, high], color="0.6", linewidth=1)
    values: dict[str, list[int]] = {}
    for number, (_, run) in enumerate(pairs):
        values.setdefault(str(run.row["point"][axis]), []).append(number)
    for index, (value, members) in enumerate(values.items()):
        x, y = ([side[number] for number in members] for side in (before, after))
        axes.scatter(x, y, s=28, marker=_MARKS[index % len(_MARKS)], label=label(value))
    axes.legend(fontsize=8, loc="upper left")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="KL without",
        ylabel=label(f"KL with {axis}"),
        xlim=(low, high),
        ylim=(low, high),
    )
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.grid(which="both", alpha=0.25)
    return rendered(figure)


def _kl(run: Finding) -> float:
    return run.kl or 0.0


def _perplexity(run: Finding) -> float:
    return run.perplexity or 0.0


def _steps(run: Finding) -> str:
    """What runs before or after the method, such as ` + ZQ-Local + LoRC`."""
    point = run.row["point"]
    extra = {axis: point.get(axis) for axis in ("transforms", "refine", "low_rank", "activations", "distill")}
    named = [value if isinstance(value, str) else axis for axis, value in extra.items() if value]
    return "".join(f" + {name}" for name in named)

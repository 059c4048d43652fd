"""Figures of a study, as PNG; they need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

from qcli.study.findings import Finding, method_name
from qcli.utils.figures import label, plain_ticks, rendered

_MARKS = "osD^v<>PX*hd"


def plot_front(runs: Sequence[Finding], front: Sequence[Finding]) -> bytes:
    """Bits per weight against KL and against perplexity, with the Pareto front by KL.

    Colours stand for methods, marker shapes for what runs before or after them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    series: dict[tuple[str, str], list[Finding]] = {}
    for run in runs:
        if run.kl is not None and run.kl > 0 and run.perplexity is not None:
            series.setdefault((method_name(run.row["point"]), _steps(run)), []).append(run)
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
    line = [run for run in front if run.kl and run.perplexity is not None]
    bits = [run.bits for run in line]
    upper.plot(bits, [run.kl for run in line], color="0.3", linewidth=1, zorder=0)
    lower.plot(bits, [run.perplexity for run in line], color="0.3", linewidth=1, zorder=0)
    upper.set(ylabel="KL to full precision, nats per token", yscale="log")
    lower.set(xlabel="bits per weight, tables counted", ylabel="perplexity", yscale="log")
    for axes in (upper, lower):
        plain_ticks(axes.yaxis)
        axes.grid(which="both", alpha=0.25)
    upper.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
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


def _steps(run: Finding) -> str:
    """What runs before or after the method, such as ` + ZQ-Local + LoRC`."""
    point = run.row["point"]
    extra = {axis: point.get(axis) for axis in ("transforms", "refine", "low_rank", "activations", "distill")}
    named = [value if isinstance(value, str) else axis for axis, value in extra.items() if value]
    return "".join(f" + {name}" for name in named)

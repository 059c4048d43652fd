"""Pictures of what the other benchmarks have kept: python -m benchmarks.plot -> results/*.png."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import RESULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUITES = ("rtn", "main", "refined", "teq", "lcq")
FEWEST_SAMPLES = 64  # of what is calibrated: peers and ours alike in the legend, never mixed in one line


def rows(suffix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Our rows with the name of the line they belong to."""
    for suite in SUITES:
        file = RESULTS / f"quality-{suite}-wikitext2{suffix}.json"
        for row in json.loads(file.read_text())["rows"] if file.exists() else ():
            if not row["samples"] or row["samples"] >= FEWEST_SAMPLES:
                yield _line(row["options"], row["samples"]), row


def draw(suffix: str, title: str, to: Path) -> None:
    """One picture: a line for each method, a mark for each peer."""
    from matplotlib import pyplot as plt

    lines: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for name, row in rows(suffix):
        points = lines.setdefault(name, {}).setdefault(row["options"]["bits"], [])
        points.append((row["bits_per_weight"], row["kl"]))
    figure, axes = plt.subplots(figsize=(12, 6), dpi=120)
    for place, (name, widths) in enumerate(sorted(lines.items())):
        for number, points in enumerate(widths.values()):  # lines join group sizes, not bits
            bits, kl = zip(*sorted(points), strict=True)
            label = name if number == 0 else None
            axes.plot(bits, kl, marker="o", color=f"C{place % 10}", linewidth=1.2, markersize=5, label=label)
    if not suffix:
        peers: dict[str, list[tuple[float, float]]] = {}
        for row in json.loads((RESULTS / "peers-wikitext2.json").read_text())["rows"]:
            peers.setdefault(row["name"], []).append((row["bits_per_weight"], row["kl"]))
        for (name, points), marker in zip(peers.items(), "xv^<>*dPX", strict=False):
            bits, kl = zip(*points, strict=True)
            axes.scatter(bits, kl, marker=marker, color="0.45", s=45, label=name, zorder=3)
    axes.set(xlabel="bits per weight, tables counted", ylabel="KL to full precision, nats per token", yscale="log")
    _finish(figure, axes, title, to)


def draw_lessons(suite: str, title: str, to: Path) -> None:
    """How students of `benchmarks.distillation` went: the held-out loss by tokens, a line each."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 6), dpi=120)
    for row in _lessons(suite):
        if row["options"].get("loss") == "dad":
            continue
        step_tokens = row["tokens"] / row["options"]["steps"]
        points = [(step * step_tokens / 1000, kl) for step, _, kl in row["curve"] if kl is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=row["name"])
    axes.set(xlabel="thousand tokens seen", ylabel="held-out KL to the teacher, nats per token", ylim=(0, None))
    _finish(figure, axes, title, to)


def draw_gammas(suite: str, title: str, to: Path) -> None:
    """What deviation awareness does: KL by gamma, a mark for each seed and a line through the means."""
    from matplotlib import pyplot as plt

    found: dict[float, list[float]] = {}
    for row in _lessons(suite):
        if row["options"].get("loss") == "dad":
            found.setdefault(row["options"]["gamma"], []).append(row["kl"])
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=120)
    gammas = sorted(found)
    for place, gamma in enumerate(gammas):
        axes.plot([place] * len(found[gamma]), found[gamma], "o", color="0.5", markersize=5)
    means = [sum(found[gamma]) / len(found[gamma]) for gamma in gammas]
    axes.plot(range(len(gammas)), means, color="C0", marker="D", markersize=6, label="mean of the seeds")
    axes.set(xlabel="gamma (0: the control)", ylabel="KL to the teacher, nats per token")
    axes.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    _finish(figure, axes, title, to)


def _lessons(suite: str) -> list[dict[str, Any]]:
    file = RESULTS / f"distillation-{suite}.json"
    kept: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    return [row for row in kept if "curve" in row]


def _finish(figure: Figure, axes: Axes, title: str, to: Path) -> None:
    axes.set_title(title)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.tight_layout()
    figure.savefig(to, metadata={"Software": None})


def _line(options: dict[str, Any], samples: int) -> str:
    """What the rows of a line have in common: all but bits and group size."""
    own = {"name", "bits", "group_size"}
    extra = [f"{key} {str(value).lower()}" for key, value in options.items() if key not in own]
    calibrated = [f"{samples} windows"] if samples else []
    return ", ".join([options["name"], *extra, *calibrated])


def main() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    draw("", "SmolLM2-135M-Instruct, WikiText-2 test, 20 windows of 512 tokens", RESULTS / "bits-kl.png")
    for blocks in (4, 8):
        draw(
            f"-{blocks}-blocks",
            f"The same, only the first {blocks} of 30 blocks quantized",
            RESULTS / f"bits-kl-{blocks}-blocks.png",
        )
    for suite, model in (("stories", "stories260k"), ("smollm2", "SmolLM2-135M-Instruct")):
        if _lessons(suite):
            draw_lessons(suite, f"Students of {model}", RESULTS / f"distillation-{suite}.png")
    if any(row["options"].get("loss") == "dad" for row in _lessons("stories")):
        draw_gammas("stories", "Deviation-aware distillation of stories260k, 2 bits", RESULTS / "distillation-dad.png")


if __name__ == "__main__":
    main()

"""Bits per weight against KL for every method and peer measured alike: python -m benchmarks.plot -> bits-kl.png."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

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
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows(suffix):
        lines.setdefault(name, []).append((row["bits_per_weight"], row["kl"]))
    figure, axes = plt.subplots(figsize=(12, 6), dpi=120)
    for place, (name, points) in enumerate(sorted(lines.items())):
        bits, kl = zip(*sorted(points), strict=True)
        axes.plot(bits, kl, marker="o", color=f"C{place % 10}", linewidth=1.2, markersize=5, label=name)
    if not suffix:
        peers: dict[str, list[tuple[float, float]]] = {}
        for row in json.loads((RESULTS / "peers-wikitext2.json").read_text())["rows"]:
            peers.setdefault(row["name"], []).append((row["bits_per_weight"], row["kl"]))
        for (name, points), marker in zip(peers.items(), "xv^<>*dPX", strict=False):
            bits, kl = zip(*points, strict=True)
            axes.scatter(bits, kl, marker=marker, color="0.45", s=45, label=name, zorder=3)
    axes.set(xlabel="bits per weight, tables counted", ylabel="KL to full precision, nats per token", yscale="log")
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


if __name__ == "__main__":
    draw("", "SmolLM2-135M-Instruct, WikiText-2 test, 20 windows of 512 tokens", RESULTS / "bits-kl.png")
    draw("-8-blocks", "The same, only the first 8 of 30 blocks quantized", RESULTS / "bits-kl-8-blocks.png")

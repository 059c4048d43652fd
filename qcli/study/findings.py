"""What the rows of a study show: sensitivity, the Pareto front, the gain of each axis, and the best run per budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qcli.utils.paths import portable_name

Row = Mapping[str, Any]
CLASSES = ((0.1, "A: up to 0.1"), (0.5, "B: 0.1 to 0.5"), (math.inf, "C: above 0.5"))
"""Sensitivity by increase of the mean perplexity (ZeroQuant-V2, arXiv 2303.08302, section 3.1)."""


@dataclass(frozen=True)
class Finding:
    """The results of one run.

    Attributes:
        label: its values on the axes, in words.
        protocol: what it was evaluated on, in words; runs with different protocols cannot be compared.
        texts: hashes and shapes of the windows of each text.
        bits: stored bits per weight of all quantizable layers, those that the run leaves dense included.
        kl: nats per token; None: not finite.
        perplexity: mean over texts; None: not finite.
        increase: of that mean over the baseline's; None: not finite.
    """

    row: Row
    label: str
    model: str
    protocol: str
    texts: tuple[str, ...]
    bits: float
    kl: float | None
    perplexity: float | None
    increase: float | None

    @property
    def sensitivity(self) -> str:
        """Class A, B or C."""
        increase = math.inf if self.increase is None else self.increase
        return next(name for bound, name in CLASSES if increase <= bound)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The results of all runs that succeeded."""
    return [_finding(row) for row in rows if row["status"] == "done"]


def pareto(runs: Sequence[Finding], loss: Literal["kl", "perplexity"] = "kl") -> list[Finding]:
    """The Pareto front of one model's runs, by bits: no other run has both fewer bits and a smaller loss."""
    front: list[Finding] = []
    least = math.inf
    finite = [(run.bits, value, run) for run in runs if (value := getattr(run, loss)) is not None]
    for _, value, run in sorted(finite, key=lambda each: each[:2]):
        if value < least:
            least = value
            front.append(run)
    return front


def gains(runs: Sequence[Finding], axis: str) -> Iterator[tuple[Finding, Finding]]:
    """Pairs of runs that differ only on `axis`: the one without it (None), and each one with a value."""
    groups: dict[str, list[Finding]] = {}
    for run in runs:
        others = {name: value for name, value in run.row["point"].items() if name != axis and value is not None}
        groups.setdefault(repr((run.model, sorted(others.items(), key=lambda item: item[0]))), []).append(run)
    for members in groups.values():
        without = [run for run in members if run.row["point"].get(axis) is None]
        for before in without[:1]:
            yield from ((before, run) for run in members if run.row["point"].get(axis) is not None)


def method_comparisons(runs: Sequence[Finding]) -> list[dict[str, Finding]]:
    """Runs of one model by method, grouped where they differ only in the method and have equal bits, to a tenth.

    Groups are sorted by bits; of two runs with the same method the better one counts.
    """
    groups: dict[str, dict[str, Finding]] = {}
    for run in sorted(runs, key=lambda run: (run.bits, math.inf if run.kl is None else run.kl)):
        point = run.row["point"]
        others = sorted((axis, repr(value)) for axis, value in _other_axes(point).items() if value is not None)
        groups.setdefault(repr((run.model, others, round(run.bits, 1))), {}).setdefault(method_name(point), run)
    return [group for group in groups.values() if len(group) > 1]


def method_name(point: Mapping[str, Any]) -> str:
    """The name of a run's method, or the study's name for it."""
    method = point.get("method.name") or point.get("method") or "base"
    return str(method.get("name", "base") if isinstance(method, Mapping) else method)


def group_size(point: Mapping[str, Any]) -> str | None:
    """The group size that a run has on the axes of its study; `row` for one group per row."""
    method = point.get("method")
    within = method.get("group_size") if isinstance(method, Mapping) else None
    size = point.get("method.group_size", within)
    return None if size is None else "row" if size == -1 else str(size)


def other_axes(point: Mapping[str, Any]) -> str:
    """A run's values on all axes but the method, in words."""
    return _label(_other_axes(point))


def _other_axes(point: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: value for axis, value in point.items() if axis not in ("method", "method.name")}


def best_within(runs: Sequence[Finding], bits: float) -> Finding | None:
    """The run of least loss among those with at most `bits`."""
    fitting = [run for run in runs if run.kl is not None and run.bits <= bits]
    return min(fitting, key=lambda run: run.kl or 0.0, default=None)


def _finding(row: Row) -> Finding:
    scores = [score["value"] for score in row["perplexity"].values()]
    baseline = list(row["baseline"]["perplexity"].values())
    finite = bool(scores) and all(value is not None for value in (*scores, *baseline))
    mean = sum(scores) / len(scores) if finite else None
    return Finding(
        row=row,
        label=_label(row["point"]),
        model=str(row["baseline"]["model"]),
        protocol=", ".join(
            f"{portable_name(text)}: {score['windows']} windows of {score['window']} tokens"
            for text, score in row["perplexity"].items()
        ),
        texts=tuple(f"{score['sha256']} {score['windows']}x{score['window']}" for score in row["perplexity"].values()),
        bits=row.get("linear_bits_per_weight", row["bits_per_weight"]),  # absent from rows of earlier versions
        kl=row["kl"],
        perplexity=mean,
        increase=None if mean is None else mean - sum(baseline) / len(baseline),
    )


def _label(point: Mapping[str, Any]) -> str:
    parts = []
    for axis, value in point.items():
        if value is None or axis == "model":
            continue
        if isinstance(value, Mapping):
            fields = ", ".join(str(inner) if key == "name" else f"{key} {inner}" for key, inner in value.items())
            parts.append(fields if axis == "method" else f"{axis} ({fields})")
        else:
            name = axis.rpartition(".")[2]
            is_name = name == "name" or (name == axis and isinstance(value, str))  # `rtn`, or the name of a section
            shown = portable_name(value) if isinstance(value, str) else str(value)
            parts.append(shown if is_name else f"{name} {shown}")
    return ", ".join(parts) or "base"

"""What the rows of a study say: sensitivity, the Pareto front, what each axis gains, and which recipe to take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
CLASSES = ((0.1, "A: up to 0.1"), (0.5, "B: 0.1 to 0.5"), (math.inf, "C: above 0.5"))
"""Sensitivity by increase of the mean perplexity (ZeroQuant-V2, arXiv 2303.08302, section 3.1)."""


@dataclass(frozen=True)
class Finding:
    """A run in figures.

    Attributes:
        label: its values on the axes, in words.
        protocol: what it was scored on, in words; runs of another protocol cannot be compared.
        texts: hashes of the windows of each text.
        bits: stored bits per weight of all quantizable layers: what a run leaves dense makes it no smaller.
        kl: nats per token; None: not finite.
        perplexity, increase: means over texts, and over the baseline's; None: not finite.
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
        """A, B or C."""
        increase = math.inf if self.increase is None else self.increase
        return next(name for bound, name in CLASSES if increase <= bound)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Of the runs that ended well."""
    done = [row for row in rows if row["status"] == "done"]
    return [_finding(row) for row in done]


def pareto(found: Sequence[Finding]) -> list[Finding]:
    """Runs of one model that no other beats: none has fewer bits and a smaller loss; by bits."""
    front: list[Finding] = []
    for each in sorted((f for f in found if f.kl is not None), key=lambda f: (f.bits, f.kl)):
        if not front or (each.kl or 0) < (front[-1].kl or 0):
            front.append(each)
    return front


def gains(found: Sequence[Finding], axis: str) -> Iterator[tuple[Finding, Finding]]:
    """Pairs of runs that differ on `axis` alone: the one where it is off (None), and each where it is on."""
    by_rest: dict[str, list[Finding]] = {}
    for each in found:
        rest = {name: value for name, value in each.row["point"].items() if name != axis and value is not None}
        by_rest.setdefault(repr((each.model, sorted(rest.items(), key=lambda item: item[0]))), []).append(each)
    for members in by_rest.values():
        off = [each for each in members if each.row["point"].get(axis) is None]
        for before in off[:1]:
            yield from ((before, each) for each in members if each.row["point"].get(axis) is not None)


def against_each_other(found: Sequence[Finding]) -> list[dict[str, Finding]]:
    """Runs of one model by method: those that differ in the method alone and take the same bits, to a tenth. By bits;
    of two runs of one method the better."""
    rows: dict[str, dict[str, Finding]] = {}
    for each in sorted(found, key=lambda each: (each.bits, math.inf if each.kl is None else each.kl)):
        rest = sorted((axis, repr(value)) for axis, value in _rest(each.row["point"]).items() if value is not None)
        rows.setdefault(repr((each.model, rest, round(each.bits, 1))), {}).setdefault(
            method_of(each.row["point"]), each
        )
    return [row for row in rows.values() if len(row) > 1]


def method_of(point: Mapping[str, Any]) -> str:
    """The name of a run's method, or what the study calls it."""
    method = point.get("method.name") or point.get("method") or "base"
    return str(method.get("name", "base") if isinstance(method, Mapping) else method)


def rest_of(point: Mapping[str, Any]) -> str:
    """A run's values on all axes but the method, in words."""
    return _label(_rest(point))


def _rest(point: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: value for axis, value in point.items() if axis not in ("method", "method.name")}


def best_within(found: Sequence[Finding], bits: float) -> Finding | None:
    """The run of least loss that takes no more bits."""
    fitting = [each for each in found if each.kl is not None and each.bits <= bits]
    return min(fitting, key=lambda each: each.kl or 0.0, default=None)


def _finding(row: Row) -> Finding:
    scores = [score["value"] for score in row["perplexity"].values()]
    before = list(row["baseline"]["perplexity"].values())
    finite = bool(scores) and all(value is not None for value in (*scores, *before))
    mean = sum(scores) / len(scores) if finite else None
    return Finding(
        row=row,
        label=_label(row["point"]),
        model=str(row["baseline"]["model"]),
        protocol=", ".join(
            f"{text}: {score['windows']} windows of {score['window']} tokens"
            for text, score in row["perplexity"].items()
        ),
        texts=tuple(score["sha256"] for score in row["perplexity"].values()),
        bits=row.get("linear_bits_per_weight", row["bits_per_weight"]),  # rows of earlier versions have none
        kl=row["kl"],
        perplexity=mean,
        increase=None if mean is None else mean - sum(before) / len(before),
    )


def _label(point: Mapping[str, Any]) -> str:
    parts = []
    for axis, value in point.items():
        if value is None or axis == "model":
            continue
        if isinstance(value, Mapping):
            inside = ", ".join(str(inner) if key == "name" else f"{key} {inner}" for key, inner in value.items())
            parts.append(inside if axis == "method" else f"{axis} ({inside})")
        else:
            name = axis.rpartition(".")[2]
            named = name == "name" or (name == axis and isinstance(value, str))  # `rtn`; what a section is called
            parts.append(str(value) if named else f"{name} {value}")
    return ", ".join(parts) or "base"

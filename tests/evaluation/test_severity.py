"""Words for KL divergences agree with what the committed results say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

from qcli.evaluation.severity import KL_WORDS, kl_word, scale, with_word

_REPOSITORY = Path(__file__).parents[2]


class Loss(NamedTuple):
    kl: float
    ratio: float
    top1: float


def measured() -> Iterator[Loss]:
    """Losses of SmolLM2-135M-Instruct on WikiText-2 test, of every row of the benchmarks and of the studies."""
    results = _REPOSITORY / "benchmarks" / "results"
    rows: list[dict[str, Any]] = []
    for file in sorted(results.glob("quality-*wikitext2*.json")):
        rows += json.loads(file.read_text())["rows"]
    for name in ("study-smollm2", "study-off-grid", "study-fused"):
        rows += map(json.loads, (results / name / "results.jsonl").read_text().splitlines())
    for row in rows:
        value, before = row.get("perplexity"), row.get("baseline_perplexity")
        if isinstance(value, dict) and "baseline" in row:
            ((text, score),) = value.items()
            value, before = score["value"], row["baseline"]["perplexity"][text]
        if value and before and row["kl"] is not None:
            yield Loss(row["kl"], value / before, row["top1_agreement"])


@pytest.mark.parametrize(
    ("kl", "word"),
    [
        *((0.0, "near-lossless"), (0.02, "near-lossless"), (0.0201, "mild"), (0.1, "mild"), (0.36, "noticeable")),
        *((0.5, "noticeable"), (0.51, "severe"), (math.inf, "severe"), (math.nan, "severe")),
    ],
)
def test_words(kl: float, word: str) -> None:
    assert kl_word(kl) == word


def test_words_beside_figures() -> None:
    assert with_word(0.04871) == "0.0487 (mild)"
    assert with_word(math.nan) == "not finite (severe)"
    assert scale() == "KL: up to 0.02 near-lossless, up to 0.1 mild, up to 0.5 noticeable, above severe"


def test_the_documented_table_is_that_of_the_committed_results() -> None:
    losses, lines, low = list(measured()), [], 0.0
    for limit, word in KL_WORDS:
        found = [loss for loss in losses if low < loss.kl <= limit]
        rises = sorted(loss.ratio - 1 for loss in found)
        agreed = sorted(loss.top1 for loss in found)
        span = f"above {low:g}" if math.isinf(limit) else f"{low:g} to {limit:g}"
        rise = f"{rises[0]:.0%} and more" if math.isinf(limit) else f"{max(0, rises[0]):.0%} to {rises[-1]:.0%}"
        lines.append(
            f"| {word} | {span} | {rise} | {median(rises):.1%} | {agreed[0]:.0%} to {agreed[-1]:.0%} | {len(found)} |"
        )
        low = limit
    text = (_REPOSITORY / "docs" / "kl.md").read_text()
    assert "\n".join(lines) in text, "\n".join(lines)

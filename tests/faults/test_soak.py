"""What `make soak` found last, and what the documentation says of it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.faults.registry import PROBLEMS, all_campaigns
from tests.faults.soak import table

_ROOT = Path(__file__).parents[2]
_RESULTS = json.loads((_ROOT / "benchmarks" / "results" / "soak.json").read_text())


def test_the_documentation_shows_the_counts() -> None:
    text = (_ROOT / "docs" / "reliability.md").read_text()
    assert table(_RESULTS["counts"]) in text
    tried = sum(row["tried"] for row in _RESULTS["counts"].values())
    minutes, processes = _RESULTS["settings"]["minutes"], _RESULTS["settings"]["processes"]
    assert f"{minutes:g} minutes, {processes} processes, {tried:,} trials" in " ".join(text.split())


def test_all_campaigns_ran_and_nothing_was_found() -> None:
    assert _RESULTS["counts"].keys() == all_campaigns().keys()
    for row in _RESULTS["counts"].values():
        assert row["tried"] > 0 and not any(row[problem] for problem in PROBLEMS)

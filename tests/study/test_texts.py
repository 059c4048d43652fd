"""Studies whose recipes name no text: all runs have the same one, also when the study goes on elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcli.study import texts
from qcli.study.grid import Run, load_study
from qcli.study.texts import with_texts


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    file = tmp_path / "study.yaml"
    file.write_text(
        "base: {model: a/b, method: {name: rtn}}\n"
        "grid: {method.bits: [2, 3]}\n"
        "include: [{method.bits: 4, calibration.data: c4, eval.perplexity: [c4, auto]}]"
    )
    return load_study(file).runs


def named(runs: list[Run], known: set[str]) -> list[Run]:
    return with_texts(runs, lambda each: each, known)


def texts_of(runs: list[Run]) -> list[tuple[Any, list[Any]]]:
    return [
        (run.recipe.calibration.data, run.recipe.eval.perplexity if run.recipe.eval is not None else []) for run in runs
    ]


def test_a_study_keeps_the_text_that_it_began_with(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "default_text", lambda _: "builtin")
    offline = named(runs, set())
    assert texts_of(offline) == [("builtin", ["builtin"])] * 2 + [("c4", ["c4", "builtin"])]
    assert len({run.address for run in offline} - {run.address for run in runs}) == 3
    monkeypatch.setattr(texts, "default_text", lambda _: "wikitext2")
    online = named(runs, set())
    assert texts_of(online) == [("wikitext2", ["wikitext2"])] * 2 + [("c4", ["c4", "wikitext2"])]
    assert named(runs, {offline[1].address}) == offline
    assert named(runs, {online[2].address}) == online


def test_no_hub_is_asked_for_where_all_texts_are_named(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "default_text", lambda _: "wikitext2")
    explicit = named(runs, set())
    monkeypatch.setattr(texts, "default_text", lambda: pytest.fail("asked"))
    assert named(explicit, set()) == explicit

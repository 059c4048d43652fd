"""A short run of the campaigns of interruptions; `make soak` runs them for long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.campaigns.interruptions import moments, signals, system_errors
from tests.faults.inject import ERRNOS, Fault
from tests.faults.registry import Trial, all_campaigns
from tests.faults.scenarios import SCENARIOS, Bench, bench
from tests.faults.trials import disturb

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]


@pytest.fixture
def here() -> Bench:
    return bench()


@pytest.mark.parametrize("number", range(len(SCENARIOS)), ids=list(SCENARIOS))
def test_one_failing_call_costs_no_result(here: Bench, number: int) -> None:
    scenario = list(SCENARIOS.values())[number]
    calls = here.expected(scenario)[1].calls
    kind = ERRNOS[number % len(ERRNOS)]
    trial = disturb(here, scenario, Fault(kind, Random(number).randint(calls // 4, calls)))
    assert trial.problem is None, trial


@pytest.mark.parametrize("campaign", [system_errors, signals, moments], ids=lambda each: str(each.__name__))
def test_campaigns_find_nothing(campaign: object, tmp_path: Path) -> None:
    trials: Iterator[Trial] = campaign(Random(1), tmp_path)  # type: ignore[operator]
    found = [trial for trial in (next(trials) for _ in range(3)) if trial.problem is not None]
    assert found == []


def test_a_wrong_result_and_a_bug_are_found(here: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: what must not be is noticed."""
    scenario = SCENARIOS["pack"]
    expected, ended = here.expected(scenario)
    monkeypatch.setitem(here._expected, scenario.name, ({**expected, "config.json": "other"}, ended))
    assert disturb(here, scenario).problem == "silent damage"
    monkeypatch.undo()
    for code, err, problem in ((1, "error: KeyError: x\n", "exit 1"), (None, "", "hang"), (3, "error: x\n", "other")):
        monkeypatch.setattr(here, "run", lambda *_, code=code, err=err, **__: ended._replace(code=code, err=err))
        assert disturb(here, scenario, Fault("EIO", 1)).problem == problem


def test_every_campaign_has_a_name_of_its_own() -> None:
    assert {"system errors", "signals at calls", "signals at any moment"} <= all_campaigns().keys()

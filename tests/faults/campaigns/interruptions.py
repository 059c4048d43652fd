"""Faults of the system and signals, at every call on files and at random moments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.faults.inject import ERRNOS, SIGNALS, Fault
from tests.faults.registry import Trial, campaign
from tests.faults.scenarios import SCENARIOS, bench
from tests.faults.trials import disturb


@campaign("system errors")
def system_errors(random: Random, _: Path) -> Iterator[Trial]:
    """The n-th call fails, for random n."""
    yield from _at_calls(random, ERRNOS)


@campaign("signals at calls")
def signals(random: Random, _: Path) -> Iterator[Trial]:
    """A signal arrives at the n-th call, for random n."""
    yield from _at_calls(random, SIGNALS)


@campaign("signals at any moment")
def moments(random: Random, _: Path) -> Iterator[Trial]:
    """A signal arrives from outside."""
    while True:
        scenario = random.choice([*SCENARIOS.values()])
        seconds = bench().expected(scenario)[1].seconds
        yield disturb(bench(), scenario, kill_after=(random.choice(SIGNALS), random.uniform(0, seconds)))


def _at_calls(random: Random, kinds: tuple[str, ...]) -> Iterator[Trial]:
    while True:
        scenario = random.choice([*SCENARIOS.values()])
        calls = bench().expected(scenario)[1].calls
        yield disturb(bench(), scenario, Fault(random.choice(kinds), random.randint(1, calls)))

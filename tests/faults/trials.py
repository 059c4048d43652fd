"""Disturb a command once, then run it again: what has to hold after each."""

from __future__ import annotations

from typing import Any

from tests.faults.inject import SIGNALS, Fault
from tests.faults.processes import Ended
from tests.faults.registry import DAMAGE, EXIT_1, HANG, OTHER, Trial
from tests.faults.scenarios import Bench, Scenario

_SHORTAGE, _PATH, _EXISTS = 5, 2, 3
_SIGNALLED = {"SIGKILL": (-9,), "SIGTERM": (143, -15), "SIGINT": (130, -2)}


class _Problem(Exception):
    """What must not be; a kind of `PROBLEMS`, and the details."""


def disturb(
    bench: Bench, scenario: Scenario, fault: Fault | None = None, kill_after: tuple[str, float] | None = None
) -> Trial:
    """Run a command with a fault or a signal, then without.

    The first run ends with a documented exit code, one line, and no half result; the second gives the result, byte for
    byte, of a run that nothing disturbed. No input changes, nothing is left behind.
    """
    expected, _ = bench.expected(scenario)
    bench.clear()
    first = bench.run([*scenario.arguments], fault=fault, kill_after=kill_after)
    kind, place = (fault.kind, f"call {fault.call} ({first.fired})") if fault else kill_after or ("", 0)
    what = f"{scenario.name}: {kind} at {place}"
    try:
        _check_first(bench, scenario, first, kind, expected)
        published = not scenario.in_place and (bench.folder / "out").exists()
        if not published:
            again = bench.run([*scenario.arguments, *scenario.again])
            _require(again.code == 0, EXIT_1 if again.code == 1 else OTHER, f"again: exit {again.code}: {again.err}")
            _require(bench.leftovers() == [], OTHER, f"left behind: {bench.leftovers()}")
        _require(bench.result() == expected, DAMAGE, "the result is not that of an undisturbed run")
        _require(bench.untouched(), DAMAGE, "an input has changed")
    except _Problem as problem:
        return Trial(what, *problem.args)
    return Trial(what)


def _check_first(bench: Bench, scenario: Scenario, first: Ended, kind: str, expected: Any) -> None:
    """What holds of the disturbed run."""
    _require(first.code is not None, HANG, first.err)
    _require(first.code != 1, EXIT_1, first.err)
    _require("Traceback" not in first.err, OTHER, first.err)
    documented = (0, *(_SIGNALLED[kind] if kind in SIGNALS else (_SHORTAGE, _PATH)))
    _require(first.code in documented, OTHER, f"exit {first.code}: {first.err}")
    if first.code in (_SHORTAGE, _PATH):
        _require(first.err.startswith(("error: ", "warning: ")) and "error: " in first.err, OTHER, first.err)
        _require("space" not in first.err.replace("No space", "") or kind in ("ENOSPC", "EDQUOT"), OTHER, first.err)
    if not scenario.in_place and (bench.folder / "out").exists():
        _require(bench.result() == expected, DAMAGE, "a result was published that is not the right one")


def _require(holds: bool, kind: str, detail: str) -> None:
    if not holds:
        raise _Problem(kind, detail)

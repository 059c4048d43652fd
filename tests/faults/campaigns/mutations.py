"""Inputs that are damaged, malformed or hostile, of every kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.mutations import Mutation, drawn, mutate
from tests.faults.processes import Ended
from tests.faults.registry import DAMAGE, EXIT_1, HANG, OTHER, Trial, campaign
from tests.faults.subjects import SUBJECTS, Kitchen, Subject, kitchen

_REFUSED = (2, 3, 4, 5, 6)
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_PIPES = ("recipe.yaml", "study.yaml", "evaluation.json")  # a user may give a pipe: `qcli run <(...)`
_LINE = re.compile(r"(error|hint|warning): ")


def _campaign(kind: str) -> None:
    @campaign(f"mutated {kind}")
    def trials(random: Random, _: Path) -> Iterator[Trial]:
        subjects = SUBJECTS[kind]()
        for mutation in drawn(random):
            subject = random.choice(subjects)
            if (trial := change(kitchen(), subject, random, mutation)) is not None:
                yield trial


for _kind in SUBJECTS:
    _campaign(_kind)


def change(here: Kitchen, subject: Subject, random: Random, mutation: Mutation) -> Trial | None:
    """Run a command on inputs of which one was mutated; None: the mutation changed nothing.

    It ends with exit code 0 or with that of a refusal and a line that says why. If the input was sealed, exit code 0
    comes with the result of the input that was not mutated.
    """
    expected = here.expected(subject) if subject.sealed else None
    file = random.choice(here.lay(subject))
    if mutation.kind == "fifo" and file.name in _PIPES:
        return None
    if mutation.kind == "end" and file.name == "results.jsonl":
        return None  # what a kill leaves: rows that are not whole do not count
    if not mutate(file, mutation):
        return None
    what = f"{subject}: {file.relative_to(here.work)}: {mutation}"
    ended = here.run(subject.arguments, counted=False)
    problem = _problem(ended)
    if problem is None and subject.sealed:
        if ended.code == 0 and (result := here.result(ended)) != expected:
            problem = DAMAGE, _difference(expected, result)
        elif ended.code != 0 and subject.again is not None:
            ended = here.run((*subject.arguments, *subject.again), counted=False)
            if ended.code != 0 or here.result(ended) != expected:
                problem = OTHER, f"{subject.again}: exit {ended.code}: {ended.err}"
    return Trial(what, *problem) if problem else Trial(what)


def _problem(ended: Ended) -> tuple[str, str] | None:
    """What must not be of any run: its kind, and the details."""
    seen = f"exit {ended.code}: {ended.err[-2000:]}"
    if ended.code is None:
        return HANG, seen
    if ended.code == 1:
        return EXIT_1, seen
    if ended.code not in (0, *_REFUSED) or "Traceback" in ended.err or _CONTROL.search(ended.err + ended.out):
        return OTHER, seen
    lines = ended.err.splitlines()
    if not all(map(_LINE.match, lines)) or (ended.code and not any(line.startswith("error: ") for line in lines)):
        return OTHER, seen
    return None


def _difference(expected: Any, result: Any) -> str:
    """Where two results differ."""
    if isinstance(expected, dict) and isinstance(result, dict):
        changed = [key for key in sorted(expected.keys() | result.keys()) if expected.get(key) != result.get(key)]
        return "; ".join(f"{key}: {_difference(expected.get(key), result.get(key))}" for key in changed[:4])
    if isinstance(expected, tuple) and isinstance(result, tuple):
        return "; ".join(map(_difference, expected, result))
    return f"{ascii(expected)[:200]} became {ascii(result)[:200]}" if expected != result else "same"

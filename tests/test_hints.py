"""Every hint in the source is executed by a test, or there is a reason why not; the page of errors is the code's."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from qcli.cli.main import app
from tests.cli.test_hints_help import CASES
from tests.hints import REASONS, TESTS

ROOT = Path(__file__).parents[1]
PAGE = runpy.run_path(str(ROOT / "docs" / "errors.py"))
HINTS = {message.hint for message in PAGE["messages"]() if PAGE["readable"](message.hint)}


def test_the_page_of_errors_is_that_of_the_code() -> None:
    script = ROOT / "docs" / "errors.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == (ROOT / "docs" / "errors.md").read_text(), "make reference"


def test_every_hint_is_executed_or_there_is_a_reason() -> None:
    reasons = [hint for hints in REASONS.values() for hint in hints]
    known = Counter([*{case.hint for case in CASES}, *TESTS, *reasons])
    assert not HINTS - known.keys(), "name the test that does as the hint says in tests/hints.py, or a reason"
    assert not known.keys() - HINTS, "no hint of the source"
    assert not [hint for hint, times in known.items() if times > 1]


@pytest.mark.parametrize("place", sorted({*TESTS.values()}))
def test_that_test_exists(place: str) -> None:
    file, _, name = place.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()


def commands() -> dict[str, Any]:
    """All commands by name; those of groups by both words."""
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, inner in group.commands.items():
        found[name] = inner
        if isinstance(inner, TyperGroup):
            found |= {f"{name} {word}": each for word, each in inner.commands.items()}
    return found


FLAGS = {
    flag
    for command in commands().values()
    for parameter in command.params
    for flag in (*parameter.opts, *parameter.secondary_opts)
}


@pytest.mark.parametrize("hint", sorted(HINTS))
def test_flags_and_commands_that_a_hint_names_exist(hint: str) -> None:
    assert {*re.findall(r"--[a-z][a-z-]+", hint)} <= FLAGS | {"--help"}
    for line in re.findall(r"`qcli ([^`…]+)", hint) + re.findall(r"(?<!`)\bqcli ([a-z]+ [A-Z…-][^`]*)", hint):
        assert shlex.split(line)[0] in commands()

"""A signal ends a session wherever it arrives, also where Python ignores exceptions."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import signal, sys, time, weakref
from qcli.cli.ui.session import Session

class Thing: ...

def arrive(thing):
    signal.raise_signal(signal.{name})
    for _ in range(1000): pass

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &
with Session(resumable=True) as session:
    thing = Thing()
    {place}
    del thing
    session.text("goes on\\n")
    time.sleep(60)
"""


@pytest.mark.parametrize("place", ["reference = weakref.ref(thing, arrive)", "Thing.__del__ = arrive"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_python_swallows_comes_again(name: str, code: int, place: str) -> None:
    script = SCRIPT.format(name=name, place=place)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.stdout == "goes on\n", "it was swallowed"
    assert (done.returncode, done.stderr) == (code, "interrupted; resume with the same command\n")


def test_other_ignored_exceptions_are_shown_and_the_hook_is_restored() -> None:
    script = """
import sys
from qcli.cli.ui.session import Session

class Thing:
    def __del__(self):
        raise ZeroDivisionError

before = sys.unraisablehook
with Session():
    Thing()
assert sys.unraisablehook is before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and "ZeroDivisionError" in done.stderr

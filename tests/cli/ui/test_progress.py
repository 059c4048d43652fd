"""Progress without a terminal: few lines, with the time left."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import pytest

from qcli.cli.ui.progress import fit_line
from qcli.cli.ui.session import Session


def test_progress_lines_are_sparse_unless_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for verbose in (0, 1):
        with Session(verbose=verbose) as session:
            for done in range(5):
                session.progress("quantize", done, 4, "detail" if done else "")
        lines.append(capsys.readouterr().err.splitlines())
    assert [line.split(",")[0] for line in lines[0]] == ["quantize 0/4", "quantize 4/4"]
    assert [line.split(",")[0] for line in lines[1]] == [f"quantize {done}/4" for done in range(5)]
    assert "left; detail" in lines[1][2]


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("qcli.cli.ui.progress.time.monotonic", clock)
    return clock


def test_time_left_counts_from_the_first_step_after_a_resume(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Session(verbose=1) as session:
        for clock.now, done in ((0.0, 900), (5.0, 905), (10.0, 1000)):
            session.progress("train", done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "train 900/1000",
        "train 905/1000, 1 min 35 s left",
        "train 1000/1000, 10.0 s",
    ]


def test_walking_through_finished_blocks_is_no_time_of_the_others(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    with Session(verbose=1) as session:
        for clock.now, done in ((0.0, 2), (60.0, 2), (100.0, 2), (130.0, 3), (160.0, 4)):
            session.progress("quantize", done, 5, "block 0 was done before" if done == 2 else "")
    assert capsys.readouterr().err.splitlines()[2:] == [
        "quantize 2/5; block 0 was done before",
        "quantize 3/5, 1 min 00 s left",
        "quantize 4/5, 30.0 s left",
    ]


DETAIL = "block 12, mean error 0.0123, worst layer error 0.0456 (mlp.down_proj)"


@pytest.mark.parametrize("width", [*range(1, 130, 7), 39, 60, 80])
def test_time_left_is_the_last_to_go(width: int) -> None:
    parts = fit_line("sampling text from the model", "12/240", "1 h 20 min left", DETAIL, width)
    gaps = {parts.name: 0, "=" * parts.bar: 1, parts.units: 1, parts.timing: 2, parts.detail: 2}
    words = [(word, gap) for word, gap in gaps.items() if word]
    assert sum(len(word) + gap for word, gap in words) - words[0][1] <= width
    assert parts.timing == "1 h 20 min left"[:width]
    assert parts.units == ("12/240" if width >= 24 else "")
    shown = [bool(part) for part in (parts.detail, parts.bar, parts.name, parts.units, parts.timing)]
    assert shown == sorted(shown), "in this order they go"
    assert not parts.detail or parts.detail == DETAIL or parts.detail.endswith("…")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Makes stderr a narrow terminal; called in the test, since pytest sets stderr between fixtures and it."""

    def begin() -> Terminal:
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    for name, value in {"TERM": "xterm", "COLUMNS": "40", "LINES": "20"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("qcli.cli.ui.progress._PATIENCE", 0.05)
    return begin


def wait_for(terminal: Terminal, text: str) -> None:
    deadline = time.monotonic() + 10
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline, terminal.getvalue()
        time.sleep(0.01)


def test_a_terminal_shows_what_is_happening_before_the_first_step(on_terminal: Callable[[], Terminal]) -> None:
    terminal = on_terminal()
    with Session() as session:
        wait_for(terminal, "loading libraries, 0 s")
        session.progress("reading the model", 0, 0)
        wait_for(terminal, "reading the model, ")
        session.progress("quantize", 0, 3, DETAIL)
        wait_for(terminal, "quantize")
        session.progress("quantize", 1, 3, DETAIL)
        wait_for(terminal, "1/3  0.")  # and the time that is left
    last = terminal.getvalue().rpartition("\r")[2]
    assert "reading the model" not in last
    assert DETAIL not in terminal.getvalue(), "no room for it"


def test_what_ends_at_once_shows_nothing(on_terminal: Callable[[], Terminal]) -> None:
    terminal = on_terminal()
    with Session() as session:
        session.progress("reading the model", 0, 0)
    time.sleep(0.1)
    assert terminal.getvalue() == ""


def test_a_spinner_leaves_nothing_behind(on_terminal: Callable[[], Terminal]) -> None:
    terminal = on_terminal()
    with Session() as session:
        wait_for(terminal, "loading libraries")
        session.stop_progress()
        left = terminal.getvalue().rpartition("\x1b[2K")[2]  # since the line was erased
        assert left.replace("\x1b[?25h", "").strip() == ""

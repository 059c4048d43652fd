"""Progress without a terminal: few lines, with the time left."""

from __future__ import annotations

import pytest

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


def test_time_left_counts_from_the_first_step_after_a_resume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 10.0])
    monkeypatch.setattr("qcli.cli.ui.progress.time.monotonic", lambda: next(clock))
    with Session(verbose=1) as session:
        for done in (900, 905, 1000):
            session.progress("train", done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "train 900/1000",
        "train 905/1000, 1 min 35 s left",
        "train 1000/1000, 10.0 s",
    ]

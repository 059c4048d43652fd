"""Closed standard streams, and readers that go away: `qcli inspect DIR | head -1`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantizing import run
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    run(tiny_model("llama", folder), folder / "q", method__name="rtn")
    environment = {**os.environ, "QCLI_CACHE": str(folder / "cache")}
    subprocess.run([sys.executable, "-m", "qcli", "doctor"], env=environment, capture_output=True, check=True)
    return folder / "q"


@pytest.fixture(autouse=True)
def _with_kernels(checkpoint: Path, _own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there already: building them would be a line on stderr."""
    monkeypatch.setenv("QCLI_CACHE", str(checkpoint.parent / "cache"))


def ended(closed: int | None, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that was started with a descriptor closed; None: stdout leads to a
    pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "qcli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=writer if closed is None else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if closed is None else lambda: os.close(closed),
    )
    os.close(writer)
    out, err = process.communicate(timeout=120)
    return process.returncode, out or "", err


@pytest.mark.parametrize(
    "command",
    [
        ("inspect",),
        ("inspect", "--json"),
        ("--help",),
        ("recipe", "schema"),
        ("recipe", "show", "--set", "model=x"),
        ("recipe",),
        ("--version",),
        ("verify", "--help"),
        ("doctor",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("closed", [None, 1])
def test_a_result_that_nobody_reads_is_no_error(checkpoint: Path, command: tuple[str, ...], closed: int | None) -> None:
    arguments = [*command, checkpoint] if command[0] == "inspect" else [*command]
    assert ended(closed, *arguments) == (141, "", "")


def test_the_other_streams_may_be_closed(checkpoint: Path, tmp_path: Path) -> None:
    for closed in (0, 2):
        code, out, err = ended(closed, "inspect", checkpoint)
        assert (code, err) == (0, "") and "bits per weight" in out
    assert ended(2, "inspect", tmp_path / "none") == (2, "", "")

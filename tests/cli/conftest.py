"""Fixtures that run commands in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from qcli.cli.main import main
from tests.tiny import tiny_model


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCLI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Call `invoke("quantize", model, "--json")` for exit code, stdout and stderr."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()  # discard the output of fixtures
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = caught.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama: two blocks, 64 wide, MLP 128 wide."""
    return tiny_model("llama", tmp_path)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some kilobytes of varied text."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400)))
    return file

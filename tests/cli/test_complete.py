"""What a shell completes, asked in the way that the scripts of `--install-completion` ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qcli.utils.registry import names
from tests.cli.conftest import Invoke

Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Complete:
    def completions(line: str) -> list[str]:
        """Of the last word of a line, as bash gets them."""
        monkeypatch.setenv("_QCLI_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        code, out, err = invoke()
        assert (code, err) == (0, "")
        return out.split()

    return completions


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qcli qu", ["quantize"]),
        ("qcli quantize --meth", ["--method"]),
        ("qcli quantize m --method ", names("qcli.algorithms.methods")),
        ("qcli quantize m --method rt", ["rtn"]),
        ("qcli pack m --format ", names("qcli.export.targets")),
        ("qcli quantize m --dtype x", []),
        ("qcli quantize m --dtype b", ["bfloat16"]),
        ("qcli distill m --train ", ["tables", "weights"]),
        ("qcli distill m --train tables,", ["tables,weights"]),
        ("qcli study ", ["run", "report"]),
        ("qcli study some.yaml --exec", ["--executor"]),
        ("qcli study some.yaml --executor ", ["local", "ray"]),
        ("qcli recipe val", ["validate"]),
        ("qcli run recipes/", []),  # files, by the shell itself
    ],
)
def test_commands_flags_and_values(complete: Complete, line: str, expected: list[str]) -> None:
    assert complete(line) == expected


def test_where_there_is_nothing_to_name_zsh_takes_files(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_QCLI_COMPLETE", "complete_zsh")
    for line in ("qcli run reci", "qcli quantize --recipe reci", "qcli quantize some"):
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        assert invoke().out.strip() == "_files"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_what_was_installed(tmp_path: Path) -> None:
    """Recipes are completed as files, the rest by qcli."""
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    program = tmp_path / "qcli"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qcli "$@"\n')
    program.chmod(0o755)
    installed = subprocess.run(
        [program, "--install-completion", "bash"], env=environment, capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    assert f"{tmp_path / '.bashrc'} was edited" in installed.stderr
    del environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"]
    before = (tmp_path / ".bashrc").read_bytes()
    refused = subprocess.run([program, "--install-completion", "nosh"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "--install-completion takes no argument" in refused.stderr
    assert (tmp_path / ".bashrc").read_bytes() == before
    scripts = [file for file in tmp_path.rglob("*qcli*") if file.suffix == ".sh"]
    assert len(scripts) == 1
    words = "COMP_WORDS=(qcli quantize m --method gp) COMP_CWORD=4"
    asked = f"source {scripts[0]}; {words}; _qcli_completion {program}; echo ${{COMPREPLY[@]}}; complete -p qcli"
    found = subprocess.run(["bash", "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["gptq-like", "complete -o default -F _qcli_completion qcli"]

"""The program around the commands: help, version, wrong usage, signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from qcli import __version__
from qcli.cli._command import Command
from qcli.cli.main import app
from qcli.cli.ui.errors import Terminated
from tests.cli.conftest import Invoke

COMMANDS = (
    *("calibrate", "quantize", "distill", "eval", "pack", "generate", "bench", "run", "inspect", "verify"),
    *("recipe", "study", "doctor"),
)


def test_version(invoke: Invoke) -> None:
    assert invoke("--version") == (0, f"qcli {__version__}\n", "")


def test_help_lists_the_commands(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = invoke("--help")
    listed = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert (code, err, tuple(sorted(listed))) == (0, "", tuple(sorted(COMMANDS)))
    assert "..." not in out.partition("Commands:\n")[2]
    monkeypatch.setenv("COLUMNS", "60")
    narrow = invoke("--help").out
    assert "..." not in narrow.partition("Commands:\n")[2] and max(map(len, narrow.splitlines())) <= 60
    monkeypatch.undo()
    assert invoke() == (0, out, "")


def test_every_flag_of_every_command_is_explained() -> None:
    group: Any = get_command(app)
    commands = [*group.commands.values(), *group.commands["recipe"].commands.values()]
    assert len(commands) == len(COMMANDS) + 3
    for command in commands:
        assert command.help, command.name
        unexplained = [parameter.name for parameter in command.params if not parameter.help]
        assert not unexplained, command.name


@pytest.mark.parametrize("group", ["recipe", "study"])
def test_help_of_groups_is_not_cut(invoke: Invoke, group: str) -> None:
    assert "..." not in invoke(group, "--help").out.partition("Commands:\n")[2]


@pytest.mark.parametrize(("group", "named"), [("recipe", "validate"), ("study", "report")])
def test_a_group_alone_shows_its_help(invoke: Invoke, group: str, named: str) -> None:
    code, out, err = invoke(group)
    assert (code, err) == (0, "")
    assert named in out
    assert invoke(group, "--help") == (0, out, "")


def test_help_of_study_shows_all_ways_and_they_exist(invoke: Invoke) -> None:
    out = invoke("study", "--help").out
    ways = [line.split("  ")[1].split()[1:] for line in out.splitlines() if line.startswith("  qcli study ")]
    assert ways == [
        ["study", "STUDY.yaml", "--dry-run"],
        ["study", "STUDY.yaml", "--out", "DIR"],
        ["study", "report", "DIR"],
    ]
    for way in ways:
        assert invoke(*way).code in (2, 3), "parsed: what is missing are the files"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["quantise"], "No such command 'quantise'. Did you mean 'quantize'?", "see `qcli --help`"),
        (["quantize", "m", "--bitz", "3"], "No such option: --bitz", "see `qcli quantize --help`"),
        (
            ["eval", "m", "--seq-len", "8"],
            "No such option: --seq-len. Did you mean '--window'?",
            "see `qcli eval --help`",
        ),
        (
            ["eval", "m", "--samples=8"],
            "No such option: --samples. Did you mean '--max-windows'?",
            "see `qcli eval --help`",
        ),
        (["quantize", "m", "--window", "8"], "--window. Did you mean '--seq-len'?", "see `qcli quantize --help`"),
        (["quantize", "m", "--samples", "x"], "Invalid value for '--samples'", "see `qcli quantize --help`"),
        (["eval"], "Missing argument 'MODEL...'", "see `qcli eval --help`"),
        (["recipe", "sow"], "No such command 'sow'. Did you mean 'show'?", "see `qcli recipe --help`"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint(invoke: Invoke, arguments: list[str], message: str, hint: str) -> None:
    code, out, err = invoke(*arguments)
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second == f"hint: {hint}"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["quantize", "m", "--bits", "3", "--out", "a", "--bits=4"], "--bits"),
        (["quantize", "m", "--symmetric", "--asymmetric"], "--symmetric/--asymmetric"),
        (["eval", "m", "--window", "8", "--window", "8"], "--window"),
        (["inspect", "m", "-q", "--quiet"], "--quiet"),
        (["study", "s.yaml", "--workers", "2", "--workers", "3"], "--workers"),
        (["recipe", "show", "r.yaml", "--json", "--json"], "--json"),
    ],
)
def test_a_flag_with_one_value_is_given_once(invoke: Invoke, arguments: list[str], names: str) -> None:
    code, out, err = invoke(*arguments)
    assert (code, out) == (2, "")
    assert f"{names} is given 2 times; give it once" in err.splitlines()[0]


def test_repeatable_flags_may_be_repeated(invoke: Invoke) -> None:
    code, _, err = invoke("quantize", "/nowhere", "--set", "seed=1", "-v", "--set", "seed=2", "-v", "--", "--json")
    assert code == 2
    assert "given" not in err


def test_every_command_has_that_check() -> None:
    def commands(group: Any) -> Iterator[Any]:
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else [command]

    found = list(commands(get_command(app)))
    assert len(found) >= len(COMMANDS)
    assert all(isinstance(command, Command) for command in found)


def test_a_signal_before_the_session_has_begun(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def arrive() -> int:
        raise Terminated

    monkeypatch.setattr("qcli.cli.ui.session.world_size", arrive)
    assert invoke("doctor") == (143, "", "interrupted\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_run_with_one_line(signum: signal.Signals, code: int) -> None:
    script = (
        "import signal, sys, time, types\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell starts with &
        "def quantize(recipe, out, progress, **_):\n"
        "    progress('quantize', 0, 30)\n"
        "    time.sleep(60)\n"
        "sys.modules['qcli.quantization.quantize'] = types.SimpleNamespace(quantize=quantize)\n"
        "from qcli.cli.main import main\n"
        "main(['quantize', 'm', '--out', 'x'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline() == "quantize 0/30\n"
        process.send_signal(signum)
        assert process.stderr.read() == "interrupted; resume with the same command\n"
        assert process.stdout.read() == ""
    assert process.returncode == code

"""qcli needs no fcntl, resource or /proc: unportable names stay in a few files, behind fall-backs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quantizing import run, weights
from tests.test_imports import ROOT
from tests.tiny import tiny_model

NOWHERE: frozenset[str] = frozenset()
MEMORY, ENVIRONMENT, FILES = (frozenset({f"utils/{name}.py"}) for name in ("memory", "environment", "files"))
KERNELS = frozenset({"inference/backends/cpu.py", "inference/cpu/build.py"})
ALLOWED = {  # unportable names, and the files that may use them
    **dict.fromkeys(("fcntl", "termios", "pwd", "grp", "msvcrt", "winreg"), NOWHERE),
    **dict.fromkeys(("fork", "forkpty", "killpg", "uname", "sysconf", "SIGKILL", "SIGALRM"), NOWHERE),
    **dict.fromkeys(("resource", "getrusage"), MEMORY),
    "CDLL": MEMORY | KERNELS,
    "sched_getaffinity": ENVIRONMENT,
    "getloadavg": frozenset({"inference/timing.py"}),
    "O_RDONLY": FILES,  # os.open, which opens no folder on Windows
    "fsync": FILES | {"utils/shards.py", "utils/journal.py"},
}
PATHS = {"/proc": MEMORY | ENVIRONMENT, "/sys": MEMORY, "/dev": NOWHERE, "/etc": NOWHERE, "/tmp": NOWHERE}
ELSEWHERE = """
import builtins, ctypes, io, os, sys

ABSENT = ("fcntl", "resource", "termios", "pwd", "grp")

def import_elsewhere(name, globals=None, *arguments, load=builtins.__import__, **keywords):
    if name in ABSENT and not globals["__name__"].startswith("psutil"):  # psutil imports by sys.platform
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return load(name, globals, *arguments, **keywords)

builtins.__import__ = import_elsewhere
for name in ("sched_getaffinity", "getloadavg", "fork"):
    delattr(os, name)

def open_elsewhere(file, *arguments, open_file=io.open, **keywords):
    if str(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return open_file(file, *arguments, **keywords)

io.open = builtins.open = open_elsewhere

def load_elsewhere(self, name, *arguments, load=ctypes.CDLL.__init__, **keywords):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    load(self, name, *arguments, **keywords)

ctypes.CDLL.__init__ = load_elsewhere

from qcli.cli.main import main
main(sys.argv[1:])
"""


def elsewhere(*arguments: object) -> str:
    """What a command prints where fcntl, resource, /proc and glibc do not exist."""
    command = [sys.executable, "-c", ELSEWHERE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_commands_run_where_only_portable_modules_exist(tmp_path: Path) -> None:
    model, here, there = tiny_model("llama", tmp_path), tmp_path / "here", tmp_path / "there"
    assert "Usage: qcli" in elsewhere("--help")
    assert "group_size: 32" in elsewhere("recipe", "show", "--set", "model=m", "--set", "method.group_size=32")
    flags = ("--method", "rtn", "--group-size", 32, "--device", "cpu", "--out", there)
    quantized = json.loads(elsewhere("quantize", model, *flags, "--json"))
    assert quantized["peak_memory"] == {}
    assert not there.with_name("there.partial").exists()
    run(model, here, method__name="rtn", device="cpu")
    expected = weights(here)
    expected["recipe.yaml"] = expected["recipe.yaml"].replace(str(here).encode(), str(there).encode())
    assert weights(there) == expected
    assert json.loads(elsewhere("inspect", there, "--json"))["bits_per_weight"] == quantized["bits_per_weight"]
    report = json.loads(elsewhere("doctor", "--json"))
    assert report["memory"] is None and report["threads"] >= 1


def test_unportable_names_stay_in_few_files() -> None:
    misplaced = [
        f"{file}:{line} names {name}"
        for file in sorted(ROOT.rglob("*.py"))
        for line, name, allowed in _unportable(ast.parse(file.read_text()))
        if file.relative_to(ROOT).as_posix() not in allowed
    ]
    assert not misplaced


def test_the_search_for_unportable_names_finds_them() -> None:
    source = (
        "import fcntl\nfrom resource import getrusage\nos.sched_getaffinity(0)\nopen('/proc/meminfo')\nPath('/proc')"
    )
    assert [(line, name) for line, name, _ in _unportable(ast.parse(source))] == [
        *((1, "fcntl"), (2, "resource"), (2, "getrusage")),
        *((3, "sched_getaffinity"), (4, "/proc"), (5, "/proc")),
    ]


def _unportable(tree: ast.AST) -> Iterator[tuple[int, str, frozenset[str]]]:
    """Every use of an unportable name: line, name, allowed files."""
    for node in ast.walk(tree):
        for name in _names(node):
            if name in ALLOWED:
                yield node.lineno, name, ALLOWED[name]  # type: ignore[attr-defined]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for path, allowed in PATHS.items():
                if node.value == path or node.value.startswith(f"{path}/"):
                    yield node.lineno, path, allowed


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (str(node.module).partition(".")[0], *(alias.name for alias in node.names))
    elif isinstance(node, ast.Attribute):
        yield node.attr

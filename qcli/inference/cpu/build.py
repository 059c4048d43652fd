"""Compiles kernels.cpp for this machine, once, into qcli's cache folder.

The library's name is a hash of the source, the flags and all macros that the compiler predefines: its version and the
instruction sets of this processor. Machines that share a home build one each, and an update builds anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from qcli.utils.cache import subfolder
from qcli.utils.errors import QcliError, UnsupportedError, warn

SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 600  # seconds


def native_flags() -> tuple[str, ...]:
    """What makes the compiler use all instructions of this processor."""
    return ("-march=native",) if is_x86() else ("-mcpu=native",)


def library(target: Sequence[str] | None = None) -> ctypes.CDLL:
    """The kernels, compiled if this machine has not done so yet.

    Args:
        target: flags that choose the instructions; default: those of this processor.

    Raises:
        UnsupportedError: there is no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise UnsupportedError("the CPU kernels are not built on Windows", hint="use WSL")
    flags = (*_FLAGS, *(native_flags() if target is None else target))
    command = find_compiler()
    name = f"kernels-{_key(command, flags)}.so"
    try:
        folder = subfolder("kernels")
        if not (folder / name).exists():
            with FileLock(folder / f"{name}.lock"):
                if not (folder / name).exists():
                    _compile(command, flags, folder / name)
        return ctypes.CDLL(str(folder / name))
    except (QcliError, OSError) as problem:
        if isinstance(problem, UnsupportedError):
            raise
        return _temporary(command, flags)  # a read-only home


def find_compiler() -> list[str]:
    """The command of the C++ compiler: `$CXX`, or the first one found.

    Raises:
        UnsupportedError: there is none.
    """
    named = os.environ.get("CXX", "").split()
    if named:
        if shutil.which(named[0]) is None:
            raise UnsupportedError(f"the C++ compiler {named[0]} was not found", hint="correct or unset CXX")
        return named
    for name in _COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise UnsupportedError("there is no C++ compiler", hint="install one, for example with `apt install g++`")


def _key(compiler: list[str], flags: Sequence[str]) -> str:
    macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    return hashlib.sha256("\n".join([*flags, macros, SOURCE.read_text()]).encode()).hexdigest()[:32]


def _compile(compiler: list[str], flags: Sequence[str], file: Path, how_often: str = "once") -> None:
    """Write the library under a name of this process, then rename it."""
    warn(f"building the CPU kernels of this machine, which takes some seconds, {how_often}")
    partial = file.with_name(f"{file.stem}-{os.getpid()}.partial")
    try:
        _run([*compiler, *flags, "-o", str(partial), str(SOURCE)])
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _temporary(compiler: list[str], flags: Sequence[str]) -> ctypes.CDLL:
    """Kernels for this process alone."""
    with tempfile.TemporaryDirectory(prefix="qcli-kernels-") as folder:
        file = Path(folder) / "kernels.so"
        _compile(compiler, flags, file, "at each start: the cache folder cannot be written (see QCLI_CACHE)")
        return ctypes.CDLL(str(file))


def _run(command: list[str]) -> str:
    """Standard output of a compiler.

    Raises:
        UnsupportedError: it fails; with its first error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise UnsupportedError(f"the C++ compiler {command[0]} fails: {problem}", hint="set CXX to another") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        reason = lines[0].strip() if lines else f"exit code {done.returncode}"
        raise UnsupportedError(f"the C++ compiler {command[0]} fails: {reason}", hint="set CXX to another")
    return done.stdout


def is_x86() -> bool:
    import platform

    return platform.machine().lower() in ("x86_64", "amd64", "i686")

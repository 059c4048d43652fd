"""Make the n-th call on the files of a folder fail, as a disk, a limit or a person would.

Calls are those that Python makes: open, read, write, sync, close, rename, remove, list, and safetensors' mapping of a
file. A write that fails has written half. The process is patched for the rest of its life: run it in a fork.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

ERRNOS = ("ENOSPC", "EIO", "EMFILE", "EACCES", "EDQUOT", "ENFILE", "EFBIG", "EROFS")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
CAUGHT = ("SIGTERM", "SIGINT")  # signals that become exceptions
_CALLS = (  # of `os`, whose first argument is a path or a descriptor
    *("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "remove", "truncate", "ftruncate", "utime"),
    *("listdir", "scandir"),
)


class Fault(NamedTuple):
    """What happens at which call; the first has number 1.

    Attributes:
        kind: name of an error number or of a signal.
    """

    kind: str
    call: int


class Injector:
    """Counts calls on files below a folder, and fails at one of them.

    Attributes:
        calls: so far.
        fired: the call that failed, in words; None: none yet.
    """

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        self.folder, self.fault = os.path.realpath(folder), fault
        self.calls = 0
        self.fired: str | None = None
        self._descriptors: set[int] = set()  # open ones on files below the folder

    def install(self) -> None:
        """Patch this process."""
        for name in _CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        self._patch_descriptors()
        opened: Any = self._open(io.open)
        builtins.open = io.open = opened
        library: Any = import_module("safetensors.torch")
        library.safe_open = self._mapped(library.safe_open)

    def happens(self, call: str, path: object, before: Callable[[], object] = lambda: None) -> None:
        """Count a call, and fail if its number has come.

        Args:
            before: what is still done of it, unless a signal comes before.
        """
        self.calls += 1
        if self.fault is None or self.calls != self.fault.call:
            return
        self.fired = f"{call} {path}"
        if self.fault.kind not in CAUGHT:
            before()
        if self.fault.kind in SIGNALS:
            os.kill(os.getpid(), getattr(signal, self.fault.kind))
            return
        number = getattr(errno, self.fault.kind)
        name = None if isinstance(path, int) else str(path)
        raise OSError(number, os.strerror(number), name)

    def watches(self, path: object, dir_fd: int | None = None) -> bool:
        """Whether calls on this path or descriptor count."""
        if isinstance(path, int):
            return path in self._descriptors
        if dir_fd is not None:
            return dir_fd in self._descriptors
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self.folder)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            if self.watches(path, options.get("dir_fd")):
                self.happens(name, path)
            return real(path, *arguments, **options)

        return call

    def _patch_descriptors(self) -> None:
        open_, close = os.open, os.close

        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            watched = self.watches(path, options.get("dir_fd"))
            if watched:
                self.happens("open", path)
            descriptor = open_(path, flags, *arguments, **options)
            if watched:
                self._descriptors.add(descriptor)
            return descriptor

        def closed(descriptor: int) -> None:
            watched = descriptor in self._descriptors
            self._descriptors.discard(descriptor)
            close(descriptor)
            if watched:
                self.happens("close", descriptor)

        for name, patched in (("open", opened), ("close", closed)):
            setattr(os, name, patched)

    def _mapped(self, real: Any) -> Callable[..., Any]:
        def safe_open(file: Any, *arguments: Any, **options: Any) -> Any:
            if self.watches(file):
                self.happens("map", file)
            return real(file, *arguments, **options)

        return safe_open

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        injector = self

        class Raw(io.FileIO):
            """A file whose every call counts."""

            failed = False

            def write(self, data: Any) -> int:
                if self.failed:  # a disk that was full still is when a buffer is flushed once more
                    raise OSError(errno.EIO, os.strerror(errno.EIO), self.name)
                half = memoryview(data).cast("B")[: memoryview(data).nbytes // 2]
                try:
                    injector.happens("write", self.name, lambda: super(Raw, self).write(half))
                except OSError:
                    self.failed = True
                    raise
                return super().write(data)

            def readinto(self, buffer: Any) -> int:
                injector.happens("read", self.name)
                return super().readinto(buffer)

            def readall(self) -> bytes:
                injector.happens("read", self.name)
                return super().readall()

            def close(self) -> None:
                if self.closed:
                    return
                injector._descriptors.discard(self.fileno())
                super().close()
                injector.happens("close", self.name)

        def open_(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: Any = None,
            errors: Any = None,
            newline: Any = None,
            *rest: Any,
        ) -> Any:
            if isinstance(file, int) or rest or not injector.watches(file):
                return real(file, mode, buffering, encoding, errors, newline, *rest)
            injector.happens("open", file)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            injector._descriptors.add(raw.fileno())
            if buffering == 0:
                return raw
            kind: Any = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            buffered = kind(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

        return open_

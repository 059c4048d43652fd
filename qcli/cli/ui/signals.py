"""SIGTERM as an exception, and neither it nor SIGINT is lost.

Python raises from a signal handler wherever the main thread is. In a weakref callback, a `__del__` or a callback from C
nothing can catch the exception: Python prints "Exception ignored in" and goes on. Here the signal comes again instead.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from qcli.cli.ui.errors import Terminated

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_AGAIN_SECONDS = 0.01  # until a swallowed signal comes again: the callback has ended by then


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Within: SIGTERM raises `Terminated`, and where an exception of SIGTERM or SIGINT is ignored it is raised again.

    Without effect outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inside, show_others = True, sys.unraisablehook

    def again(signum: signal.Signals) -> None:
        time.sleep(_AGAIN_SECONDS)
        if inside:
            _send(signum)

    def swallowed(args: UnraisableHookArgs) -> None:
        if issubclass(args.exc_type, KeyboardInterrupt | Terminated):
            signum = signal.SIGTERM if issubclass(args.exc_type, Terminated) else signal.SIGINT
            # `threading` would take locks, which what was interrupted may hold
            _thread.start_new_thread(again, (signum,))
        else:
            show_others(args)

    previous = signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        inside = False
        sys.unraisablehook = show_others
        signal.signal(signal.SIGTERM, previous)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _send(signum: signal.Signals) -> None:
    """Signal the main thread, so that its system call ends too; on Windows its handler is called after that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signum)
    else:
        _thread.interrupt_main(signum)

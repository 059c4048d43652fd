"""The only place that prints: results to stdout, everything else to stderr.

A command body runs inside a `Session`, which turns exceptions into one line and an exit code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qcli.cli.ui.errors import INTERRUPTED, TERMINATED, USAGE, describe, show_error
from qcli.cli.ui.progress import Bars, Lines
from qcli.cli.ui.signals import raised_signals
from qcli.cli.ui.streams import abandon_stdout, label, tell
from qcli.cli.ui.tables import Tables, console
from qcli.utils.distributed import fails_first, is_main_process, world_size
from qcli.utils.errors import QcliWarning
from qcli.utils.memory import return_large_blocks, use_huge_pages
from qcli.utils.progress import silent
from qcli.utils.text import printable, without_controls

if TYPE_CHECKING:
    from qcli.utils.progress import Progress

_LINE_SECONDS = 10.0  # between two progress lines of a stage


class Session:
    """One command: its verbosity, progress, result and exit code.

    While it is open, whatever libraries print to stdout goes to stderr.

    Args:
        json: print the result as one JSON object in place of tables.
        quiet: no progress, no notes.
        verbose: 1 shows every progress step, 2 also tracebacks and the libraries' warnings.
        resumable: whether the same command continues an interrupted run.
        distributed: whether processes of `torchrun` can share the work; only the main one prints the result.
        markdown: draw tables as Markdown.
        memory_hint: shown when memory runs out.
    """

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: int = 0,
        resumable: bool = False,
        distributed: bool = False,
        markdown: bool = False,
        memory_hint: str = "fewer calibration samples or a shorter seq_len take less",
    ) -> None:
        self.json, self.quiet, self.verbose = json, quiet or not is_main_process(), verbose
        self.resumable, self.distributed, self.markdown = resumable, distributed, markdown
        self.memory_hint = memory_hint
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.stdout = sys.stdout
        prints = self._exits.enter_context(open(os.devnull, "w")) if self.quiet else sys.stderr  # of libraries
        self._exits.enter_context(contextlib.redirect_stdout(prints))
        self._exits.enter_context(warnings.catch_warnings())
        if self.verbose < 2:
            warnings.simplefilter("ignore")
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if self.quiet:
            os.environ.setdefault("TQDM_DISABLE", "1")  # read when a library imports tqdm
            self._exits.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.ERROR)  # qcli says itself what failed
        warnings.simplefilter("always", QcliWarning)
        warnings.showwarning = self._showwarning(warnings.showwarning)
        if self.quiet or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        self._exits.enter_context(raised_signals())
        return_large_blocks()
        use_huge_pages()
        self.progress = self._progress()
        if world_size() > 1 and not self.distributed:
            self._exits.close()
            if fails_first():
                show_error(
                    f"this command runs in one process, WORLD_SIZE says {world_size()}",
                    hint="torchrun is for `qcli quantize`, `distill` and `run`; without it, unset WORLD_SIZE",
                )
            raise SystemExit(USAGE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, BrokenPipeError):
            abandon_stdout()
        message, hint, code = describe(error, resumable=self.resumable, memory_hint=self.memory_hint)
        if not fails_first():
            raise SystemExit(code) from None
        if self.verbose >= 2 and isinstance(error, Exception):
            traceback.print_exception(error)
        if code in (INTERRUPTED, TERMINATED):
            tell(message)
        else:
            show_error(message, hint)
        raise SystemExit(code) from None

    def note(self, text: str) -> None:
        """Print a remark that is not part of the result."""
        if not self.quiet:
            tell(printable(text))

    def suggest(self, commands: Callable[[], Iterable[str]]) -> None:
        """Print what may be done next, a command a line, which `commands` gives; with `--json` nothing.

        The command has done its work: whatever goes wrong in here is told with `-v` and changes no exit code.
        """
        if self.quiet or self.json:
            return
        self.stop_progress()
        try:
            for command in commands():
                tell(f"next: {printable(command)}")
        except Exception as error:
            if self.verbose >= 2:
                traceback.print_exception(error)
            elif self.verbose:
                self.note(f"no further suggestions: {type(error).__name__}: {error}")

    def result(self, data: Mapping[str, Any], show: Callable[[Tables, dict[str, Any]], None] | None = None) -> None:
        """Print the command's result: drawn by `show`, or as one JSON object with `--json` or without `show`."""
        if not is_main_process():
            return
        self.stop_progress()
        if self.json or show is None:
            print(json.dumps(_finite(data), indent=2), file=self.stdout, flush=True)
        else:
            show(Tables(console(self.stdout), markdown=self.markdown), dict(data))
            self.stdout.flush()

    def stop_progress(self) -> None:
        """Draw no bar or spinner until the next step, so that something else can be written or read."""
        if isinstance(self.progress, Bars):
            self.progress.stop()

    def text(self, text: str) -> None:
        """Print a result that is text already, such as YAML."""
        self.stdout.write(text)
        self.stdout.flush()

    @contextlib.contextmanager
    def stream(self) -> Iterator[Callable[[str], None]]:
        """Within: what prints a result piece by piece. Its last line is ended, at an exception too if it has begun.

        On a terminal, control characters are escaped: the text may be anyone's. So are, everywhere, characters that
        the encoding of stdout does not have.
        """
        self.stop_progress()
        terminal, encoding, last = self.stdout.isatty(), self.stdout.encoding or "utf-8", ""

        def write(piece: str) -> None:
            nonlocal last
            last = piece
            shown = without_controls(piece) if terminal else piece
            self.text(shown.encode(encoding, "backslashreplace").decode(encoding))

        try:
            yield write
        except BaseException:
            if last and not last.endswith("\n"):
                self.text("\n")
            raise
        if not last.endswith("\n"):
            self.text("\n")

    def _showwarning(self, show_others: Callable[..., None]) -> Callable[..., None]:
        """What shows warnings: qcli's own are notes."""

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, QcliWarning):
                if not self.quiet:
                    tell(f"{label('warning')} {printable(str(message))}")
            else:
                show_others(message, category, *place)

        return show

    def _progress(self) -> Progress:
        if self.quiet:
            return silent
        if sys.stderr.isatty():
            bars = Bars()
            self._exits.callback(bars.stop)
            bars("loading libraries", 0, 0)
            return bars
        return Lines(interval=0.0 if self.verbose else _LINE_SECONDS)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

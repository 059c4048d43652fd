"""The only place that prints: results to stdout, everything else to stderr.

A command body runs inside a `Session`, which turns errors into one line and an exit code.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from qcli.utils.distributed import is_main_process, world_size
from qcli.utils.errors import QcliError
from qcli.utils.markdown import plain
from qcli.utils.memory import return_large_blocks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from qcli.utils.progress import Progress

BUG, USAGE, STATE, RESOURCES, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 3, 5, 130, 141, 143

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_OURS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory")
_LINE_SECONDS = 10.0  # between two plain progress lines of a stage


class Session:
    """One command: its verbosity, its progress, its result, its exit code.

    While it is open, whatever libraries write to stdout goes to stderr.

    Args:
        json: the result is one JSON object instead of tables.
        quiet: no progress, no notes.
        verbose: 1 explains more, 2 shows tracebacks and the libraries' warnings.
        resumable: whether the same command continues an interrupted run.
        markdown: tables are drawn for documents.
        together: whether several processes of `torchrun` can share the work; the first one alone prints the result.
    """

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: int = 0,
        resumable: bool = False,
        together: bool = False,
        markdown: bool = False,
    ) -> None:
        self.json, self.quiet, self.verbose, self.resumable = json, quiet or not is_main_process(), verbose, resumable
        self.together, self.markdown = together, markdown
        self.memory_hint = "fewer calibration samples or a shorter seq_len take less"
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.stdout = sys.stdout
        self._exits.enter_context(contextlib.redirect_stdout(sys.stderr))
        if self.verbose < 2:
            self._exits.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if self.quiet or not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        with contextlib.suppress(ValueError):  # not the main thread
            previous = signal.signal(signal.SIGTERM, _terminate)
            self._exits.callback(signal.signal, signal.SIGTERM, previous)
        return_large_blocks()
        self.progress = self._progress()
        if world_size() > 1 and not self.together:
            self._exits.close()
            show_error(
                f"this command runs in one process, WORLD_SIZE says {world_size()}",
                hint="only `qcli distill` shares its work under torchrun; elsewhere unset WORLD_SIZE",
            )
            raise SystemExit(USAGE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, BrokenPipeError):  # or Python complains about it once more when it ends
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        lines, hint, code = describe(error, resumable=self.resumable, memory_hint=self.memory_hint)
        if code in (USAGE, STATE) and not is_main_process():  # all processes meet it; one tells
            raise SystemExit(code) from None
        if self.verbose >= 2 and isinstance(error, Exception):
            traceback.print_exception(error)
        if code in (INTERRUPTED, TERMINATED):
            print(lines, file=sys.stderr)
        else:
            show_error(lines, hint)
        raise SystemExit(code) from None

    def note(self, text: str) -> None:
        """Tell something that is not the result."""
        if not self.quiet:
            print(clean(text), file=sys.stderr)

    def result(self, data: Mapping[str, Any], show: Callable[[Tables, dict[str, Any]], None] | None = None) -> None:
        """Print what the command is for: as `show` draws it, or with `--json` as one JSON object."""
        if not is_main_process():
            return
        if isinstance(self.progress, _Bars):
            self.progress.stop()
        if self.json or show is None:
            print(json.dumps(_finite(data), indent=2), file=self.stdout, flush=True)
        else:
            show(Tables(_console(self.stdout), markdown=self.markdown), dict(data))
            self.stdout.flush()

    def text(self, text: str) -> None:
        """Print a result that is text already, as YAML."""
        self.stdout.write(text)
        self.stdout.flush()

    def _progress(self) -> Progress:
        if self.quiet:
            from qcli.utils.progress import silent

            return silent
        if sys.stderr.isatty():
            bars = _Bars()
            self._exits.callback(bars.stop)
            return bars
        return _Lines(every=0.0 if self.verbose else _LINE_SECONDS)


class Tables:
    """Draws results; names from files are shown as they are, never as markup or control codes."""

    def __init__(self, console: Console, *, markdown: bool = False) -> None:
        self.console, self.markdown = console, markdown

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
        """Rows under a header; numbers to the right."""
        if self.markdown:
            self._markdown_table(columns, rows, title)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
        for i, column in enumerate(columns):
            numbers = bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
            drawn.add_column(column, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers)
        for row in rows:
            drawn.add_row(*(Text(clean(_cell(value))) for value in row))
        self.console.print(drawn)

    def pairs(self, pairs: Mapping[str, Any]) -> None:
        """Names and values, a line each; None is left out."""
        shown = {name: _cell(value) for name, value in pairs.items() if value is not None}
        width = max(map(len, shown), default=0)
        for name, value in shown.items():
            self._print(f"- {name}: {plain(value)}" if self.markdown else f"{name:<{width}}  {value}")

    def _markdown_table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None) -> None:
        def row(cells: Sequence[Any]) -> str:
            return f"| {' | '.join(plain(_cell(value)) for value in cells)} |"

        lines = [row(columns), f"|{'|'.join('---' for _ in columns)}|", *map(row, rows), ""]
        for line in [plain(title), "", *lines] if title else lines:
            self._print(line)

    def line(self, text: str) -> None:
        """One line of text; of a document, a paragraph."""
        self._print(plain(text) if self.markdown else text)
        if self.markdown:
            self._print("")

    def _print(self, text: str) -> None:
        self.console.print(clean(text), soft_wrap=True, markup=False, highlight=False, emoji=False)


def describe(
    error: BaseException, *, resumable: bool = False, memory_hint: str | None = None
) -> tuple[str, str | None, int]:
    """What to tell about an error: its lines, a hint, and the exit code."""
    text = str(error)
    if isinstance(error, QcliError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt | Terminated):
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        return "interrupted" + ("; resume with the same command" if resumable else ""), None, code
    if isinstance(error, BrokenPipeError):
        return "", None, BROKEN_PIPE
    if (isinstance(error, OSError) and error.errno in _DISK_FULL) or "No space left on device" in text:
        where = getattr(error, "filename", None)
        return (
            f"disk full{f': {where}' if where else ''}",
            "free some space and run the same command",
            RESOURCES,
        )
    no_memory = isinstance(error, RuntimeError | OSError) and any(words in text for words in _OUT_OF_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        return "out of memory", memory_hint, RESOURCES
    if isinstance(error, OSError) and error.errno in _NOT_OURS and error.filename is not None:
        return f"{error.filename}: {error.strerror}", None, USAGE
    summary = text.strip().splitlines()[0] if text.strip() else ""
    return f"{type(error).__name__}: {summary}", "this is a bug; run with -vv for the traceback", BUG


def show_error(message: str, hint: str | None = None) -> None:
    """One `error:` line for each line of `message`, then the hint, on stderr."""
    for line in message.splitlines():
        print(f"error: {clean(line)}", file=sys.stderr)
    if hint:
        print(f"hint: {clean(hint)}", file=sys.stderr)


def clean(text: str) -> str:
    """Text without control characters: they are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bits(found: Mapping[str, Any]) -> str:
    """Bits per weight of the quantized layers and of the whole model."""
    return f"{found['bits_per_weight']:.4g} (whole model {found['model_bits_per_weight']:.4g})"


def size(count: int) -> str:
    """Bytes for people: `1.24 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """Seconds for people: `8.3 s`, `4 min 05 s`, `1 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Terminated(BaseException):
    """SIGTERM arrived."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
    return str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console(file: Any) -> Console:
    from rich.console import Console

    width = None if file.isatty() else 200
    return Console(file=file, width=width)


class _Lines:
    """Progress where nobody sees a bar: a line when a stage starts, ends, and now and then."""

    def __init__(self, every: float) -> None:
        self.every = every
        self.started: dict[str, tuple[float, int]] = {}
        self.told: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if done == 0 or stage not in self.started:
            self.started[stage] = now, done
        elif done < total and now - self.told[stage] < self.every:
            return
        self.told[stage] = now
        began, first = self.started[stage]
        elapsed = now - began
        if first < done < total:
            rest = f", {duration(elapsed / (done - first) * (total - done))} left"
        else:
            rest = f", {duration(elapsed)}" if done == total else ""
        print(
            clean(f"{stage} {done}/{total}{rest}{f'; {detail}' if detail else ''}"),
            file=sys.stderr,
            flush=True,
        )


class _Bars:
    """Progress on a terminal; nothing appears before the first step."""

    def __init__(self) -> None:
        self.bars: Bars | None = None
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        bars = self.bars = self.bars or self.start()
        if stage not in self.tasks:
            self.tasks[stage] = bars.add_task(clean(stage), total=total, detail="")
        elif done == 0:
            bars.reset(self.tasks[stage], total=total)
        bars.update(self.tasks[stage], completed=done, total=total, detail=clean(detail))

    def start(self) -> Bars:
        from rich import progress
        from rich.console import Console

        bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            progress.TextColumn("{task.fields[detail]}", markup=False),
            console=Console(stderr=True),
            speed_estimate_period=3600,
            redirect_stdout=False,
        )
        bars.start()
        return bars

    def stop(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.tasks = None, {}

"""Progress of long steps: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qcli.cli.ui.columns import ELLIPSIS
from qcli.cli.ui.streams import tell
from qcli.cli.ui.tables import duration
from qcli.utils.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

_PATIENCE = 0.5  # seconds without a sign of life; most errors of users come sooner
_BAR, _SHORT_BAR, _SHORT_NAME = 24, 8, 8  # characters
_FRAMES, _ASCII_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\"


@dataclass
class Stage:
    """A stage and its clock, which runs from the last moment before its first unit was done here.

    What an interrupted run had done took no time, and neither did walking through it count.
    """

    name: str
    total: int
    done: int
    detail: str
    first: int
    started: float
    ended: float | None = None

    @classmethod
    def begun(cls, name: str, done: int, total: int, detail: str) -> Stage:
        """A stage of which `done` units were done before."""
        return cls(name, total, done, detail, first=done, started=time.monotonic())

    def advance(self, done: int, total: int, detail: str) -> None:
        """Note another step."""
        self.done, self.total, self.detail = done, total, detail
        if done <= self.first:
            self.first, self.started = done, time.monotonic()
        self.ended = time.monotonic() if done >= total else None

    def timing(self) -> str:
        """The time that is left, or that it took; nothing before the first unit."""
        if self.ended is not None:
            return duration(self.ended - self.started)
        if self.done <= self.first:
            return ""
        elapsed = time.monotonic() - self.started
        return f"{duration(elapsed / (self.done - self.first) * (self.total - self.done))} left"


class Lines:
    """One line on stderr when a stage starts and when it ends, and every `interval` seconds in between."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._stages: dict[str, Stage] = {}
        self._printed: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if total == 0:
            return
        known = self._stages.get(stage)
        if known is None or done == 0:
            known = self._stages[stage] = Stage.begun(stage, done, total, detail)
        else:
            known.advance(done, total, detail)
            if done < total and time.monotonic() - self._printed[stage] < self.interval:
                return
        self._printed[stage] = time.monotonic()
        timing = known.timing()
        line = f"{stage} {done}/{total}{f', {timing}' if timing else ''}{f'; {detail}' if detail else ''}"
        tell(printable(line))


class Bars:
    """One bar for each stage; until there is one, or of what has no units, a spinner with what is happening."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._tasks: dict[str, tuple[Stage, TaskID]] = {}
        self._waiting: tuple[Stage, TaskID | None] | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        with self._lock:
            self._end_waiting()
            if total == 0:
                self._wait(stage)
                return
            bars = self._bars = self._bars or _start_bars()
            if stage not in self._tasks or done == 0:
                begun = Stage.begun(stage, done, total, detail)
                if stage in self._tasks:
                    task = self._tasks[stage][1]
                    bars.reset(task, total=total, stage=begun)
                else:
                    task = bars.add_task(stage, total=total, stage=begun)
                self._tasks[stage] = begun, task
            known, task = self._tasks[stage]
            known.advance(done, total, detail)
            bars.update(task, completed=done, total=total)

    def stop(self) -> None:
        """Leave the bars as they are; a later step draws new ones."""
        with self._lock:
            self._end_waiting()
            if self._bars is not None:
                self._bars.live.transient = not self._tasks
                self._bars.stop()
            self._bars, self._tasks = None, {}

    def _wait(self, what: str) -> None:
        self._waiting = Stage.begun(what, 0, 0, ""), None
        if self._bars is not None:
            self._show_waiting()
            return
        self._timer = threading.Timer(_PATIENCE, self._lose_patience)
        self._timer.daemon = True
        self._timer.start()

    def _lose_patience(self) -> None:
        with self._lock:
            if self._waiting is not None and self._timer is threading.current_thread():
                self._bars = self._bars or _start_bars()
                self._show_waiting()

    def _show_waiting(self) -> None:
        if self._bars is not None and self._waiting is not None:
            stage = self._waiting[0]
            self._waiting = stage, self._bars.add_task(stage.name, total=None, stage=stage)

    def _end_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._bars is not None and self._waiting is not None and self._waiting[1] is not None:
            self._bars.remove_task(self._waiting[1])
        self._waiting = self._timer = None


class Fitted(NamedTuple):
    """What of a stage has room in a line; the parts are empty where they have none.

    Attributes:
        bar: characters of the bar.
        units: as in `3/24`.
    """

    name: str
    bar: int
    units: str
    timing: str
    detail: str


def fit_line(name: str, units: str, timing: str, detail: str, width: int) -> Fitted:
    """The parts of a line of `width` characters: the detail goes first, then the bar, and the time goes last."""
    room = width - sum(len(part) + gap for part, gap in ((units, 1), (timing, 2)) if part)
    if room < _SHORT_NAME:
        return Fitted("", 0, units if room >= 0 else "", timing[:width], "")
    shown = _cut(name, room)
    room -= len(shown) + 1
    bar = min(_BAR, room) if room >= _SHORT_BAR else 0
    room -= bar + 1 if bar else 0
    room -= 1  # a second space before the detail
    return Fitted(shown, bar, units, timing, _cut(detail, room) if room >= _SHORT_NAME else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1].rstrip()}{ELLIPSIS}"


def _start_bars() -> Progress:
    from rich import progress
    from rich.console import Console

    class Line(progress.ProgressColumn):
        """A stage, as wide as the terminal."""

        max_refresh = None

        def render(self, task: progress.Task) -> Text:
            return _line(task.fields["stage"], console)

    console = Console(stderr=True)
    bars = progress.Progress(Line(), console=console, redirect_stdout=False)
    bars.start()
    return bars


def _line(stage: Stage, console: Console) -> Text:
    from rich.text import Text

    ascii_only = console.options.ascii_only
    name, line = printable(stage.name), Text(no_wrap=True, overflow="crop", end="")
    if stage.total == 0:
        frames, waited = _ASCII_FRAMES if ascii_only else _FRAMES, time.monotonic() - stage.started
        line.append(f"{frames[int(10 * waited) % len(frames)]} {name}, {waited:.0f} s")
        return line
    parts = fit_line(name, f"{stage.done}/{stage.total}", stage.timing(), printable(stage.detail), console.width)
    filled = parts.bar * stage.done // stage.total
    full, empty = "#-" if ascii_only else "━━"
    line.append(parts.name)
    if parts.bar:
        line.append(" ").append(full * filled, style="green").append(empty * (parts.bar - filled), style="dim")
    for gap, text in ((1, parts.units), (2, parts.timing), (2, parts.detail)):
        line.append(f"{gap * ' ' if line.plain else ''}{text}" if text else "")
    if ascii_only:
        line.plain = line.plain.replace(ELLIPSIS, "~")
    return line

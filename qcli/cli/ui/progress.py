"""Progress of long steps: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qcli.cli.ui.streams import tell
from qcli.cli.ui.tables import duration
from qcli.utils.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Lines:
    """One line on stderr when a stage starts and when it ends, and every `interval` seconds in between."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._started: dict[str, tuple[float, int]] = {}  # time and first unit of a stage
        self._printed: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if done == 0 or stage not in self._started:
            self._started[stage] = now, done
        elif done < total and now - self._printed[stage] < self.interval:
            return
        self._printed[stage] = now
        started, first = self._started[stage]
        elapsed = now - started
        if first < done < total:  # a resumed stage does not start at 0
            timing = f", {duration(elapsed / (done - first) * (total - done))} left"
        else:
            timing = f", {duration(elapsed)}" if done == total else ""
        line = f"{stage} {done}/{total}{timing}{f'; {detail}' if detail else ''}"
        tell(printable(line))


class Bars:
    """One bar for each stage; nothing appears before the first step."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        bars = self._bars = self._bars or _start_bars()
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(printable(stage), total=total, detail="")
        elif done == 0:
            bars.reset(self._tasks[stage], total=total)
        bars.update(self._tasks[stage], completed=done, total=total, detail=printable(detail))

    def stop(self) -> None:
        """Leave the bars as they are; a later step draws new ones."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}


def _start_bars() -> Progress:
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

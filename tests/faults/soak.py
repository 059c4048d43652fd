"""Run all campaigns for a while, and count: `python -m tests.faults.soak --minutes 20`.

Every trial that failed is printed as it is found, with the seed that leads to it. The counts are written as JSON. The
exit code is 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from random import Random
from threading import Thread
from typing import Any

from benchmarks.common import machine
from tests.faults.registry import PROBLEMS, Trial, all_campaigns

_TURN = 20.0  # seconds of a campaign before the next one's turn


def main() -> int:
    """Run, print, and say whether anything was found."""
    options = _options()
    if options.worker is not None:
        _work(options)
        return 0
    counts = {name: dict.fromkeys(("tried", *PROBLEMS), 0) for name in _chosen(options)}
    started = time.monotonic()
    for entry in _reports(options):
        row = counts[entry["campaign"]]
        row["tried"] += 1
        if entry["problem"] is not None:
            row[entry["problem"]] += 1
            print(
                f"FOUND {entry['campaign']} [{entry['problem']}] {entry['what']}\n      {entry['detail']}", flush=True
            )
    found = sum(row[problem] for row in counts.values() for problem in PROBLEMS)
    _show(counts, time.monotonic() - started)
    if options.results is not None:
        settings = {key: getattr(options, key) for key in ("minutes", "processes", "seed")}
        results = {"machine": machine(), "settings": settings, "counts": counts}
        options.results.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if found or not all(row["tried"] for row in counts.values()) else 0


def trials(name: str, seed: int, folder: Path) -> Iterator[Trial]:
    """The trials of a campaign; equal seeds give equal ones."""
    return all_campaigns()[name](Random(f"{name}:{seed}"), folder)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all random choices; default: the time")
    parser.add_argument("--only", action="append", help="a campaign; may be repeated")
    parser.add_argument("--results", type=Path, help="JSON file for the counts")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[str]:
    names = [*all_campaigns()]
    if unknown := set(options.only or ()) - set(names):
        sys.exit(f"no campaign {min(unknown)}; there are {', '.join(names)}")
    return options.only or names


def _reports(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What all processes report, as it comes; each has a pipe of its own, since long lines mix in a shared one."""
    command = [sys.executable, "-m", "tests.faults.soak", *sys.argv[1:], "--seed", str(options.seed), "--worker"]
    lines: Queue[str | None] = Queue()

    def forward(worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    for number in range(options.processes):
        worker = subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True)
        Thread(target=forward, args=[worker], daemon=True).start()
    for _ in range(options.processes):
        while (line := lines.get()) is not None:
            yield json.loads(line)


def _work(options: argparse.Namespace) -> None:
    """Give every campaign its turn until the time is over; print a line for each trial."""
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="qcli-soak-") as folder:
        running = {}
        for name in _chosen(options):
            (Path(folder) / name).mkdir()
            running[name] = trials(name, options.seed + options.worker, Path(folder) / name)
        while time.monotonic() < deadline:
            for name, stream in running.items():
                turn = time.monotonic() + _TURN
                while time.monotonic() < min(turn, deadline):
                    print(json.dumps({"campaign": name, **next(stream)._asdict()}), flush=True)


def table(counts: dict[str, dict[str, int]]) -> str:
    """The counts as a Markdown table."""
    columns = ("tried", *PROBLEMS)
    rows = [f"| {name} | {' | '.join(f'{row[column]:,}' for column in columns)} |" for name, row in counts.items()]
    return "\n".join([f"| campaign | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns), *rows])


def _show(counts: dict[str, dict[str, int]], seconds: float) -> None:
    print(table(counts))
    print(f"{sum(row['tried'] for row in counts.values())} tried in {seconds / 60:.0f} minutes")


if __name__ == "__main__":
    sys.exit(main())

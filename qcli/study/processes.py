"""Runs of a study in several processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from qcli.study.grid import Run
from qcli.study.rows import Row
from qcli.study.run import TRIES, failure, make_row, row_head
from qcli.utils.trust import NOTHING, Trust


def rows_from_processes(runs: Sequence[Run], out: Path, workers: int, trust: Trust = NOTHING) -> Iterator[Row]:
    """Rows in order of completion. A run whose process is killed is resumed by another, up to twice, then has failed.

    Args:
        out: folder of the study.
        workers: number of parallel runs, each in its own process: if one dies, only that run is affected.

    Raises:
        StateError: another process is working on one of the runs.
        ResourceError: the folder of a run cannot be created.
    """
    queue = [(run, 1) for run in runs]
    working: dict[Future[Row], tuple[Run, int, ProcessPoolExecutor]] = {}
    idle = [_process(workers) for _ in range(min(workers, len(runs)))]
    try:
        while queue or working:
            while queue and idle:
                pool, (run, tries) = idle.pop(), queue[0]
                try:
                    working[pool.submit(make_row, run, out, trust=trust)] = run, tries, pool
                except BrokenProcessPool:  # its process was killed while idle
                    idle.append(_process(workers))
                else:
                    del queue[0]
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                run, tries, pool = working.pop(future)
                try:
                    row = future.result()
                except BrokenProcessPool:
                    idle.append(_process(workers))
                    if tries < TRIES:
                        queue.insert(0, (run, tries + 1))
                        continue
                    row = row_head(run) | failure(f"its process was killed {TRIES} times, perhaps for its memory", 5)
                    row["hint"] = "fewer --workers take less memory"
                else:
                    idle.append(pool)
                yield row
    except BaseException:  # interrupted: stop at once, as runs can be resumed
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        for pool in [*idle, *(pool for _, _, pool in working.values())]:
            pool.shutdown(cancel_futures=True)


def _process(workers: int) -> ProcessPoolExecutor:
    """A pool of one process, which uses its share of this machine's cores."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_start_worker, initargs=(threads,))


def _start_worker(threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process when its parent dies: a killed parent cannot stop its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""Runs of a study on a Ray cluster: the optional extra `ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcli.study.grid import Run
from qcli.study.rows import Row
from qcli.study.run import TRIES, failure, headed, make_row
from qcli.utils.errors import ResourceError, UnsupportedError


def rows_from_ray(runs: Sequence[Run], out: Path, workers: int, address: str | None) -> Iterator[Row]:
    """Rows as their runs end. A run whose worker dies is taken up by another, twice at most, then told as failed.

    A run takes one GPU where the cluster has any and the recipe does not say `cpu`, and its share of the CPUs.

    Args:
        out: folder of the study; all nodes see it under this path.
        workers: runs at a time.
        address: of a running cluster; None: one is started on this machine.

    Raises:
        UnsupportedError: Ray is not installed.
        ResourceError: there is no cluster at `address`, or it is lost.
        StateError: another process makes one of the runs.
    """
    if find_spec("ray") is None:
        raise UnsupportedError("Ray is not installed", hint="pip install ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or it reports to its makers
    import ray

    _connect(address)
    try:
        make = ray.remote(max_retries=TRIES - 1)(make_row)
        has, cpus = ray.cluster_resources(), _cpus_each(ray.nodes(), workers)
        waiting: dict[Any, Run] = {}
        queue = list(runs)
        while queue or waiting:
            while queue and len(waiting) < workers:
                run = queue.pop(0)
                gpus = 1 if has.get("GPU") and run.recipe.device != "cpu" else 0
                waiting[make.options(num_cpus=cpus, num_gpus=gpus).remote(run, out)] = run
            (ended,), _ = ray.wait(list(waiting), num_returns=1)
            run = waiting.pop(ended)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayTaskError as error:  # what `make_row` raises is no row
                raise error.cause from None
            except ray.exceptions.RayError as error:
                yield headed(run) | failure(f"its worker died {TRIES} times: {type(error).__name__}", 5)
    finally:
        ray.shutdown()


def _cpus_each(nodes: Sequence[Mapping[str, Any]], workers: int) -> int:
    """A run's share of the CPUs; a run that asked for more than the largest node has would wait for ever."""
    found = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    return max(1, min(sum(found) // workers, max(found, default=0)))


def _connect(address: str | None) -> None:
    import ray

    problem = ""
    for _ in range(2 if address is None else 1):  # Ray gives a node half a minute to start, and machines are busy
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            return
        except Exception as error:  # Ray has no class of its own for this
            problem = str(error).splitlines()[0]
            ray.shutdown()
    raise ResourceError(f"Ray at {address or 'this machine'}: {problem}", hint="`ray status` tells if it runs")

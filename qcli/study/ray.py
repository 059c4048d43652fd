"""Runs of a study on a Ray cluster; needs the optional extra `ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcli.study.grid import Run
from qcli.study.rows import Row
from qcli.study.run import TRIES, failure, make_row, row_head
from qcli.utils.errors import ResourceError, UnsupportedError
from qcli.utils.progress import silent
from qcli.utils.trust import NOTHING, Trust


def rows_from_ray(
    runs: Sequence[Run], out: Path, workers: int, address: str | None, trust: Trust = NOTHING
) -> Iterator[Row]:
    """Rows in order of completion. A run whose worker dies is resumed by another, up to twice, then has failed.

    A run uses one GPU, if the cluster has any and its recipe does not select `cpu`, and its share of the CPUs.

    Args:
        out: folder of the study; all nodes see it under this path.
        workers: number of parallel runs.
        address: of a running cluster; None: start one on this machine.

    Raises:
        UnsupportedError: Ray is not installed.
        ResourceError: there is no cluster at `address`, or the connection is lost.
        StateError: another process is working on one of the runs.
    """
    if find_spec("ray") is None:
        raise UnsupportedError("Ray is not installed", hint="pip install ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports
    import ray

    _connect(address)
    try:
        make: Any = ray.remote(max_retries=TRIES - 1)(make_row)
        resources, cpus = ray.cluster_resources(), _cpus_per_run(ray.nodes(), workers)
        pending: dict[Any, Run] = {}
        queue = list(runs)
        while queue or pending:
            while queue and len(pending) < workers:
                run = queue.pop(0)
                gpus = 1 if resources.get("GPU") and run.recipe.device != "cpu" else 0
                pending[make.options(num_cpus=cpus, num_gpus=gpus).remote(run, out, silent, trust)] = run
            (finished,), _ = ray.wait(list(pending), num_returns=1)
            run = pending.pop(finished)
            try:
                yield ray.get(finished)
            except ray.exceptions.RayTaskError as error:  # raised by `make_row`
                raise error.cause from None
            except ray.exceptions.RayError as error:
                yield row_head(run) | failure(f"its worker died {TRIES} times: {type(error).__name__}", 5)
    finally:
        ray.shutdown()


def _cpus_per_run(nodes: Sequence[Mapping[str, Any]], workers: int) -> int:
    """A run's share of the CPUs; no more than the largest node has, or the run would wait forever."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    return max(1, min(sum(cpus) // workers, max(cpus, default=0)))


def _connect(address: str | None) -> None:
    import ray

    problem = ""
    for _ in range(2 if address is None else 1):  # a node has half a minute to start, too little on a busy machine
        try:
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            return
        except Exception as error:  # Ray raises no specific class
            problem = str(error).splitlines()[0]
            ray.shutdown()
    raise ResourceError(f"Ray at {address or 'this machine'}: {problem}", hint="check it with `ray status`")

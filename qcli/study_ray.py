"""Runs of a study on a Ray cluster: the optional extra `ray`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from qcli.errors import UnsupportedError
from qcli.study import Row, make_row


def rows_from_ray(
    jobs: Sequence[tuple[str, dict[str, Any], str, str]], workers: int, address: str | None
) -> Iterator[Row]:
    """Rows as their runs end; a run whose worker dies is tried once more elsewhere, then told as failed.

    Args:
        jobs: arguments of `make_row`.
        workers: runs at a time.
        address: of a running cluster; None: one is started on this machine.

    Raises:
        UnsupportedError: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UnsupportedError("Ray is not installed", hint="pip install 'qcli[ray]'")
    import ray

    ray.init(address=address, num_cpus=None if address else workers, log_to_driver=False, include_dashboard=False)
    try:
        remote = ray.remote(num_cpus=1, max_retries=1)(make_row)
        waiting: dict[Any, Any] = {}
        queue = list(jobs)
        while queue or waiting:
            while queue and len(waiting) < workers:
                job = queue.pop(0)
                waiting[remote.remote(*job)] = job
            (ended,), _ = ray.wait(list(waiting), num_returns=1)
            recipe, point, run, _ = waiting.pop(ended)
            try:
                yield ray.get(ended)
            except ray.exceptions.RayError as error:
                row = {"address": run, "point": point, "recipe": recipe, "status": "failed", "exit_code": 1}
                yield row | {"error": f"its worker died: {type(error).__name__}"}
    finally:
        ray.shutdown()

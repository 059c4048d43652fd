"""Sizes, and where a command keeps its activations: on a GPU if they fit, else in host memory, or not at all."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from qcli.utils import placement
from qcli.utils.errors import ResourceError
from qcli.utils.placement import SIZE, Demand, Peak, limit_memory, parse_size, place

GB = 10**9
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEMAND = Demand(device=6 * GB, resident=6 * GB, waiting=20 * GB, host=2 * GB, together=7 * GB)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    bytes = {"cpu": 64 * GB, "cuda": 40 * GB}
    monkeypatch.setattr(placement, "free_memory", lambda device: bytes[device.type])
    monkeypatch.setattr(placement, "free_memory_of_host", lambda: bytes["cpu"])
    return bytes


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * GB), ("7.5GiB", 7.5 * 2**30), ("900MB", 9e8), ("1MiB", 2**20), ("24.25GB", 24.25e9)]
)
def test_sizes(text: str, size: float) -> None:
    assert re.match(SIZE, text)
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8", "8gb", "8 GB", "0GB", "-1GB", "8TB", ".5GB", "8GBs", "80%", "1e3GB", ""])
def test_other_words_are_no_sizes(text: str) -> None:
    assert not re.match(SIZE, text)


def test_activations_stay_on_the_gpu_while_they_fit(free: dict[str, int]) -> None:
    roomy = place(DEMAND, CUDA, None, "this")
    assert (roomy.on_host, roomy.peak, roomy.host_peak) == (False, 26 * GB, 2 * GB)
    free["cuda"] = 28 * GB  # a tenth is lost to fragments
    tight = place(DEMAND, CUDA, None, "this")
    assert (tight.on_host, tight.peak, tight.host_peak) == (True, 6 * GB, 22 * GB)
    assert tight.problem is None
    assert tight.in_words() == (
        "about 6.0 GB of GPU memory (25.2 GB usable), about 22.0 GB of host memory (64.0 GB free); "
        "activations wait in host memory"
    )
    assert place(DEMAND, CUDA, "26GB", "this").on_host is False  # the bound itself loses nothing
    assert place(DEMAND, CUDA, "25GB", "this").on_host is True


@pytest.mark.parametrize(
    ("device", "limit", "gpu", "host", "problem"),
    [
        (CUDA, None, 6, 64, "this needs about 6.0 GB of GPU memory, 5.4 GB are free"),
        (CUDA, "5.5GB", 40, 64, "this needs about 6.0 GB of GPU memory, --max-memory allows 5.5GB"),
        (CUDA, "8GB", 40, 21, "this needs about 22.0 GB of host memory, 21.0 GB are free"),
        (CPU, None, 40, 26, "this needs about 27.0 GB of memory, 26.0 GB are free"),
        (CPU, "26GB", 40, 64, "this needs about 27.0 GB of memory, --max-memory allows 26GB"),
    ],
)
def test_what_does_not_fit_is_refused(
    device: torch.device, limit: str | None, gpu: int, host: int, problem: str, free: dict[str, int]
) -> None:
    free.update(cuda=gpu * GB, cpu=host * GB)
    placed = place(DEMAND, device, limit, "this")
    assert placed.problem == problem
    with pytest.raises(ResourceError, match=re.escape(problem)) as refused:
        placed.require("do with less")
    assert (refused.value.hint, refused.value.exit_code) == ("do with less", 5)


def test_a_cpu_has_one_memory_and_a_limit_in_place_of_what_is_free(free: dict[str, int]) -> None:
    free["cpu"] = 26 * GB
    placed = place(DEMAND, CPU, "27GB", "this")
    assert (placed.problem, placed.peak, placed.host_peak, placed.on_host) == (None, 27 * GB, None, False)
    assert placed.in_words() == "about 27.0 GB of host memory (27.0 GB allowed)"


def test_unknown_memory_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_memory", lambda _: None)
    placed = place(DEMAND, CPU, None, "this")
    assert (placed.problem, placed.in_words()) == (None, "about 27.0 GB of host memory")


def test_phases_that_peak_on_one_side_do_not_add_up() -> None:
    peak = Peak(runtime=1)
    peak.add(device=5, host=2)
    peak.add(device=1, host=4)
    peak.add(device=3, waiting=4)
    assert peak.demand(waiting=3) == Demand(device=5, resident=7, waiting=3, host=5, together=8)


def test_what_one_phase_keeps_waits_where_activations_do(free: dict[str, int]) -> None:
    demand = Demand(device=6 * GB, resident=9 * GB, waiting=20 * GB, host=2 * GB, together=10 * GB)
    assert place(demand, CUDA, "29GB", "this").on_host is False
    placed = place(demand, CUDA, "28GB", "this")
    assert (placed.on_host, placed.peak, placed.host_peak) == (True, 6 * GB, 25 * GB)


def test_a_limit_ends_with_the_run_that_it_was_given_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study runs several recipes in one process."""
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share))
    for limit in ("8GB", "100GB", None):
        limit_memory(CUDA, limit)
        limit_memory(CPU, limit)
    assert shares == [0.1, 1.0, 1.0]

"""Two tiers of tests: those not marked `slow` are the fast ones, and a test that takes long must be marked."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

FAST_TEST_SECONDS = 5.0  # of CPU time, about ten times what unmarked tests take: first imports and busy machines


def _cpu_seconds() -> float:
    """CPU time of this process and of those it has waited for."""
    return sum(os.times()[:4])


@pytest.fixture(autouse=True)
def _fast_unless_marked_slow(request: pytest.FixtureRequest) -> Iterator[None]:
    started = _cpu_seconds()
    yield
    seconds = _cpu_seconds() - started
    if seconds > FAST_TEST_SECONDS and "slow" not in request.keywords:
        pytest.fail(f"took {seconds:.1f} s of CPU time: speed it up, or mark it with @pytest.mark.slow")

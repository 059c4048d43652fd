"""Freed memory goes back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys, torch
from qcli.utils.allocator import return_large_blocks
if sys.argv[1] == "given":
    return_large_blocks()

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

torch.zeros(31 << 20, dtype=torch.uint8)  # freed: from now on glibc keeps what is smaller
before, kept = resident(), []
for _ in range(12):
    large, small = torch.ones(16 << 20, dtype=torch.uint8), torch.ones(1 << 16, dtype=torch.uint8)
    kept.append((large, small))
kept = [small for _, small in kept]
del large
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone behaves so")
def test_holes_are_not_kept() -> None:
    kept = {
        how: int(subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("as it is", "given")
    }
    assert kept["given"] < 20_000 < kept["as it is"], kept

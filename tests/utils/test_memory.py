"""What a process is said to have used."""

from __future__ import annotations

import subprocess
import sys

import pytest

LARGE = 1 << 30
CHILD = "import torch; from qcli.utils.memory import peak_memory; print(peak_memory(torch.device('cpu'))['rss'])"
HOLES = """
import sys, torch
from qcli.utils.memory import return_large_blocks
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
PARENT = f"""
import subprocess, sys
held = b"x" * {LARGE}
print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


def test_the_peak_is_not_that_of_the_program_that_started_this_one() -> None:
    found = subprocess.run([sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, check=True).stdout
    assert 1 << 26 < int(found) < LARGE


def test_the_peak_stays() -> None:
    program = f"{CHILD}; large = b'x' * {LARGE}; del large; {CHILD}"
    before, after = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(after) > int(before) + LARGE // 2


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone behaves so")
def test_holes_are_not_kept() -> None:
    kept = {
        how: int(subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True).stdout)
        for how in ("as it is", "given")
    }
    assert kept["given"] < 20_000 < kept["as it is"], kept

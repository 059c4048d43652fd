"""Peak memory of a process, and freed blocks that return to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LARGE = 1 << 30
CHILD = "import torch; from qcli.utils.memory import peak_memory; print(peak_memory(torch.device('cpu'))['rss'])"
HOLES = """
import sys, torch
from qcli.utils.memory import return_large_blocks
if sys.argv[1] == "fixed threshold":
    return_large_blocks()

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

torch.zeros(31 << 20, dtype=torch.uint8)  # freed: glibc raises its mmap threshold to 31 MiB
before, kept = resident(), []
for _ in range(12):
    large, small = torch.ones(16 << 20, dtype=torch.uint8), torch.ones(1 << 16, dtype=torch.uint8)
    kept.append((large, small))
kept = [small for _, small in kept]
del large
print(resident() - before)
"""
HUGE = """
from qcli.cli.ui.session import Session
with Session() as session:
    import torch
    large = torch.ones(64 << 20, dtype=torch.uint8)
    line = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
    print(line.split()[1], file=session.stdout)
"""
PARENT = f"""
import subprocess, sys
held = b"x" * {LARGE}
print(subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.slow
def test_the_peak_excludes_the_parent_process() -> None:
    peak = subprocess.run([sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, check=True).stdout
    assert 1 << 26 < int(peak) < LARGE


@pytest.mark.slow
def test_the_peak_includes_freed_memory() -> None:
    program = f"{CHILD}; large = b'x' * {LARGE}; del large; {CHILD}"
    before, after = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(after) > int(before) + LARGE // 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_blocks_return_to_the_system() -> None:
    kept = {
        how: int(subprocess.run([sys.executable, "-c", HOLES, how], capture_output=True, text=True, check=True).stdout)
        for how in ("default", "fixed threshold")
    }
    assert kept["fixed threshold"] < 20_000 < kept["default"], kept


def test_commands_have_large_tensors_on_huge_pages() -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[madvise]" not in modes.read_text():
        pytest.skip("this system gives huge pages to all programs, or to none")
    done = subprocess.run([sys.executable, "-c", HUGE], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) > 32 << 10

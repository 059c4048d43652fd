"""What a process is said to have used."""

from __future__ import annotations

import subprocess
import sys

LARGE = 1 << 30
CHILD = "import torch; from qcli.utils.memory import peak_memory; print(peak_memory(torch.device('cpu'))['rss'])"
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

"""What a user waits for: commands from start to end, the first block of `quantize`, and the first token of `generate`.

Wall seconds of processes of their own. `generate` runs twice, first with an empty cache of kernels: how much later its
first token and its end then come is what compiling costs; the second run has the model's own figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import DEVICE, save
from benchmarks.gpu.models import make

NEW_TOKENS = 64
_FIRST_BLOCK = """
import os, sys, time
from qcli.cli import main as program
program.import_little()
from qcli.quantization.sequential import Sequential

def first(self, *arguments):
    os.write(1, str(time.time()).encode())
    os._exit(0)

Sequential.load = first
program.main(sys.argv[1:])
"""


def seconds(command: list[str]) -> float | str:
    """Of a process; its last lines if it failed."""
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return " ".join(done.stderr.splitlines()[-3:])
    return round(time.perf_counter() - begun, 2)


def first_block(arguments: list[str]) -> float | str:
    """Seconds until `quantize` begins with the first block."""
    begun = time.time()
    done = subprocess.run([sys.executable, "-c", _FIRST_BLOCK, *arguments], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return round(float(lines[-1]) - begun, 2) if lines else " ".join(done.stderr.splitlines()[-3:])


def generated(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """What `generate` reports, and the seconds of its process."""
    command = [sys.executable, "-m", "qcli", "generate", str(checkpoint), "--prompt", "w1 w2 w3 w4", "--json", "-q"]
    command += ["--max-new-tokens", str(NEW_TOKENS), "--device", DEVICE, "--dtype", "bfloat16"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_CACHE_DIR": str(cache)})
    if done.returncode:
        return {"failed": " ".join(done.stderr.splitlines()[-3:])}
    result = json.loads(done.stdout)
    kept = {name: result[name] for name in ("first_token_seconds", "tokens_per_second", "backends", "memory")}
    return {"process_seconds": round(time.perf_counter() - begun, 2), **kept}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    results: dict[str, Any] = {"what": __doc__, "seconds": {}}

    def keep(name: str, value: Any) -> None:
        results["seconds"][name] = value
        print(name, value, flush=True)
        save("gpu_commands", results)

    qcli = [sys.executable, "-m", "qcli"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(folder, "135M", 30)
        common = [str(model.folder), "--device", DEVICE, "--data", str(model.text), "--samples", "2", "--seq-len", "32"]
        keep(
            "import torch, and a context",
            seconds([sys.executable, "-c", f"import torch; torch.ones(1, device='{DEVICE}')"]),
        )
        keep("qcli --help", seconds([*qcli, "--help"]))
        for turn in ("first", "second"):
            keep(
                f"quantize until the first block, {turn}",
                first_block(["quantize", *common, "--out", str(folder / turn)]),
            )
        rtn = [*common[:3], "--method", "rtn", "--bits", "4"]
        keep("quantize, rtn, 4 bits", seconds([*qcli, "quantize", *rtn, "--out", str(folder / "q"), "-q"]))
        for turn in ("kernels not compiled yet", "kernels compiled before"):
            keep(f"generate, {turn}", generated(folder / "q", folder / "kernels"))
        keep("doctor", seconds([*qcli, "doctor"]))


if __name__ == "__main__":
    main()

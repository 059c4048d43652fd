"""Quantizing and distilling on a GPU, by the commands, on Llamas of random weights with the shapes of 8B, 70B and 135M.

Seconds and peak GPU memory of a process; blocks are alike, so a few stand for all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.memory import Size, write_llama, write_text

SIZES = {
    "8B": (Size(4096, 14336, 32, 8), 2),
    "70B": (Size(8192, 28672, 64, 8), 1),
    "135M": (Size(576, 1536, 9, 3, 49152), 30),
    "tiny": (Size(128, 256, 4, 2, 500), 2),
}  # and blocks
METHODS = {
    "rtn": ["--method", "rtn", "--bits", "4"],
    "gptq-like": ["--method", "gptq-like", "--bits", "4", "--group-size", "128"],
    "lcq": ["--method", "lcq", "--bits", "2", "--group-size", "64"],
    "refined": ["--method", "gptq-like", "--bits", "2", "--group-size", "64", "--set", "refine.steps=20"],
}


def command(arguments: list[str], seconds: float) -> dict[str, Any]:
    """The JSON result of a command of qcli, and how long the process took; its last line if it failed."""
    begun = time.time()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "qcli", *arguments, "--json", "-q"], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {seconds:.0f} s"}
    if done.returncode:
        return {"failed": " ".join(done.stderr.splitlines()[-2:])}
    result: dict[str, Any] = json.loads(done.stdout)
    return result | {"process_seconds": time.time() - begun}


def measure(given: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        save("gpu_quantizing", {"samples": given.samples, "seq_len": given.seq_len, "rows": rows})

    with tempfile.TemporaryDirectory() as folder:
        for name in given.sizes.split(","):
            size, blocks = SIZES[name]
            model, text = Path(folder) / name, Path(folder) / f"{name}.txt"
            write_llama(model, blocks, size)
            write_text(text, given.samples * given.seq_len + 1, size.vocab)
            shared = ["--data", str(text), "--samples", str(given.samples), "--seq-len", str(given.seq_len)]
            shared += ["--device", given.device]
            for method in given.methods.split(","):
                out = str(Path(folder) / f"{name}-{method}")
                arguments = ["quantize", str(model), *METHODS[method], *shared, "--out", out]
                result = command(arguments, given.limit)
                keep({"size": name, "blocks": blocks, "method": method, **_short(result)})
            if name == given.distill:
                student = str(Path(folder) / f"{name}-{given.methods.split(',')[0]}")
                for train in ("tables", "tables,weights"):
                    out = str(Path(folder) / f"{name}-distilled-{len(train)}")
                    arguments = ["distill", student, "--teacher", str(model), "--train", train, "--steps", "20"]
                    result = command([*arguments, *shared, "--out", out], given.limit)
                    keep({"size": name, "blocks": blocks, "method": f"distill {train}", **_short(result)})


def _short(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("failed", "seconds", "process_seconds", "peak_memory", "steps", "tokens")
    return {name: result[name] for name in kept if name in result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", default="8B,135M,70B")
    parser.add_argument("--methods", default="gptq-like,rtn,lcq,refined")
    parser.add_argument("--distill", default="135M", help="the size that is distilled too")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--limit", type=float, default=60, help="seconds of a command")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()

"""Rounding, packing and start-up: python -m benchmarks.speed

Weights per second of rtn with packing included, of packing alone and of unpacking, on matrices that rotate through more
than the caches, medians of interleaved rounds; and the wall time of `qcli --help` and of a recipe with errors.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.methods.rtn import RTN
from qcli.core.packing import pack_bits, unpack_bits

ROUNDS, SHAPE, MATRICES = 7, (4096, 4096), 6


def rates(arms: dict[str, Callable[[int], object]]) -> dict[str, float]:
    """Millions of weights a second by arm; arms take turns in every round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(ROUNDS + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm(turn % MATRICES)
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: round(SHAPE[0] * SHAPE[1] / statistics.median(seen) / 1e6) for name, seen in times.items()}


def rounding() -> dict[str, Any]:
    """By bits: rtn with packing, from bf16 and from float32 weights."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(SHAPE, generator=generator) * 0.02 for _ in range(MATRICES)]
    halves = [weight.bfloat16() for weight in weights]

    def rtn(bits: int, source: list[torch.Tensor]) -> Callable[[int], object]:
        method = RTN(bits=bits, group_size=64)

        def arm(turn: int) -> object:
            (solution,) = method.quantize(LinearGroup({"w": source[turn]})).values()
            return solution.weight.format.to_stored(solution.weight)

        return arm

    arms: dict[str, Callable[[int], object]] = {}
    for bits in (2, 3, 4, 8):
        arms[f"rtn + pack, {bits} bits, float32"] = rtn(bits, weights)
        arms[f"rtn + pack, {bits} bits, bfloat16"] = rtn(bits, halves)
    for bits in (1, 2, 3, 4, 8):
        codes = [(weight * 100).to(torch.int32).bitwise_and(2**bits - 1).to(torch.uint8) for weight in weights]
        packed = [pack_bits(code, bits) for code in codes]
        arms[f"pack, {bits} bits"] = lambda turn, codes=codes, bits=bits: pack_bits(codes[turn], bits)  # type: ignore[misc]
        arms[f"unpack, {bits} bits"] = lambda turn, packed=packed, bits=bits: unpack_bits(packed[turn], bits, SHAPE[1])  # type: ignore[misc]
    return rates(arms)


def startup() -> dict[str, Any]:
    """Median wall milliseconds of whole processes, bytecode cached, as it is after the first start."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    qcli = str(Path(sys.executable).parent / "qcli")
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.yaml"
        broken.write_text("model: x\nmethod: {name: gptq-like, bitz: 3}\nseeed: 1\n")
        commands = {
            "qcli --help": [qcli, "--help"],
            "recipe with two errors": [qcli, "recipe", "validate", str(broken)],
        }
        found = {}
        for name, command in commands.items():
            times = []
            for _ in range(12):
                started = time.perf_counter()
                subprocess.run(command, capture_output=True, check=False, env=environment)
                times.append(1000 * (time.perf_counter() - started))
            found[name] = {"median_ms": round(statistics.median(times[1:])), "best_ms": round(min(times))}
    return found


def main() -> None:
    result = {"what": __doc__, "million_weights_per_second": rounding(), "startup": startup()}
    print(common.save("speed", result).read_text())


if __name__ == "__main__":
    main()

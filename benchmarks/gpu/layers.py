"""Single layers from packed weights beside bf16 `F.linear`: time, ratio and achieved bandwidth.

Every arm runs over a ring of weights larger than four times the L2 cache, inside a CUDA graph, timed by events; the
arms take turns, and the figures are medians over rounds. The relative error against float64 is checked in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.machine import DEVICE, TINY, Calls, clear, save
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.inference.backends import triton as backend
from qcli.inference.cuda import tuning
from tests.inference.weights import random_weight

FORMATS: dict[str, Format] = {
    "4 bits": Affine(bits=4, group_size=128),
    "3 bits": Affine(bits=3, group_size=128),
    "2 bits": Affine(bits=2, group_size=64),
    "lcq 2 bits": Codebook(bits=2, group_size=64, rank=1, table_bits=8),
    "dbllm": DualBinary(group_size=64),
    "onebit": Sign(),
    "8 bits": Affine(bits=8, group_size=128),
    "lcq 3 bits": Codebook(bits=3, group_size=64, rank=1, table_bits=8),
    "lcq 4 bits": Codebook(bits=4, group_size=64, rank=1, table_bits=8),
}
SHAPES = ((64, 256), (128, 128)) if TINY else ((14336, 4096), (4096, 4096), (4096, 14336))
ROWS = (1, 16) if TINY else (1, 4, 16, 64, 256, 2048)
ROUNDS = 2 if TINY else 12
CHOICES = 2 if TINY else None
RING_BYTES = 1 if TINY else 256 << 20
_TILE = 1 << 22


@dataclass
class Layer:
    """A random packed layer on the GPU, and a ring of copies of its tensors."""

    format: Format
    shape: tuple[int, int]
    dense: Tensor  # bfloat16
    ring: list[dict[str, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.ring[0].values())


def make(format: Format, shape: tuple[int, int]) -> Layer:
    weight = random_weight(format, shape)
    tensors = {name: tensor.to(DEVICE) for name, tensor in format.to_stored(weight).items()}
    copies = max(2, -(-RING_BYTES // sum(tensor.nbytes for tensor in tensors.values())))
    ring = [tensors, *({name: tensor.clone() for name, tensor in tensors.items()} for _ in range(copies - 1))]
    return Layer(format, shape, weight.dense().to(DEVICE).bfloat16(), ring)


def compared(arms: dict[str, Calls], rounds: int) -> dict[str, float]:
    """Median microseconds of a call of each arm; the arms take turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, calls in arms.items():
            times[name].append(calls.microseconds())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def error(layer: Layer, x: Tensor, y: Tensor) -> float:
    weight = layer.format.from_stored(layer.ring[0], layer.shape)
    expected = torch.cat([x.double() @ part.double().T for part in weight.dense().split(1024)], dim=-1)
    return float((y.double() - expected).norm() / expected.norm())


def measure(layer: Layer, rows: int, rounds: int) -> dict[str, Any]:
    x = torch.randn(rows, layer.shape[1], device=DEVICE).bfloat16()
    triton = backend.Triton()
    packed: list[Callable[[], Tensor]] = [
        partial(triton.linear, x, layer.format, layer.shape, tensors, None) for tensors in layer.ring
    ]
    copies = max(2, RING_BYTES // layer.dense.nbytes)
    copied = [layer.dense, *(layer.dense.clone() for _ in range(copies))]
    dense: list[Callable[[], Tensor]] = [partial(F.linear, x, weight) for weight in copied]
    at_once = 1 if TINY else 8 if rows > 64 else 64
    arms = {
        "packed": Calls(packed[:at_once]),
        "bf16": Calls(dense[:at_once]),
    }
    times = compared(arms, rounds)
    return {
        "us": times["packed"],
        "us_bf16": times["bf16"],
        "ratio": times["packed"] / times["bf16"],
        "gb_per_s": layer.bytes / times["packed"] / 1000,
        "error": error(layer, x, packed[0]()),
    }


def table(formats: list[str], shapes: list[tuple[int, int]], rows: list[int], rounds: int, name_of_result: str) -> None:
    results = []
    for name, shape in itertools.product(formats, shapes):
        layer = make(FORMATS[name], shape)
        for count in rows:
            result = {"format": name, "shape": list(shape), "rows": count, **measure(layer, count, rounds)}
            results.append(result)
            line = "{format:10} {shape} {rows:5}: {us:8.1f} us, {ratio:5.2f} of bf16, {gb_per_s:6.0f} GB/s, {error:.1e}"
            print(line.format(**result), flush=True)
            save(name_of_result, {"rows": results})
        del layer
        clear()


def choices(name: str, shape: tuple[int, int], rows: int) -> list[tuning.Gemv | tuning.Matmul]:
    """Configurations to compare for a format; none where it has no kernel for so many rows."""
    return [*_choices(rows, matmul=backend.prepare(FORMATS[name], shape, _small(name, shape)).has_matmul)][:CHOICES]


def _choices(rows: int, *, matmul: bool) -> Iterator[tuning.Gemv | tuning.Matmul]:
    if rows == 1:
        for chunks, outputs in ((1, 4), (1, 8), (1, 16), (2, 4), (2, 8)):
            yield tuning.Gemv(chunks, outputs)
        if matmul:
            yield tuning.matmul(rows)
    elif matmul:
        for outputs, warps, stages, programs in itertools.product((64, 128), (4, 8), (3,), (4, 8, 16)):
            if outputs >= 16 * warps:
                yield tuning.Matmul(outputs, warps, stages, programs)


def run(x: Tensor, call: backend.Call, tuned: tuning.Gemv | tuning.Matmul) -> Tensor:
    if isinstance(tuned, tuning.Gemv):
        return backend.gemv(x, call, None, tuned)
    return backend.matmul(x, call, None, tuned)


def run_once(job: tuple[str, tuple[int, int], int, tuning.Gemv | tuning.Matmul]) -> None:
    """Compile one configuration, for the cache on disk."""
    name, shape, rows, tuned = job
    weight = _small(name, shape)
    x = torch.randn(rows, shape[1], device=DEVICE).bfloat16()
    call = backend.prepare(FORMATS[name], shape, weight)
    try:
        run(x, call, tuned)
    except Exception as problem:
        print(name, rows, tuned, repr(problem)[:200], flush=True)


def _small(name: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Tensors of the right shapes without values."""
    stored = FORMATS[name].stored(shape)
    return {suffix: torch.ones(entry.shape, dtype=entry.torch_dtype, device=DEVICE) for suffix, entry in stored.items()}


def sweep(formats: list[str], shapes: list[tuple[int, int]], rows: list[int], rounds: int, name_of_result: str) -> None:
    jobs = [
        (name, shape, count, tuned)
        for name, shape, count in itertools.product(formats, shapes, rows)
        for tuned in choices(name, shape, count)
    ]
    begun = time.time()
    with multiprocessing.get_context("spawn").Pool(1 if TINY else 14) as pool:
        pool.map(run_once, jobs, chunksize=1)
    print(f"compiled {len(jobs)} in {time.time() - begun:.0f} s", flush=True)
    results = []
    for name, shape in itertools.product(formats, shapes):
        layer = make(FORMATS[name], shape)
        for count in rows:
            x = torch.randn(count, shape[1], device=DEVICE).bfloat16()
            calls = [backend.prepare(layer.format, shape, tensors) for tensors in layer.ring][:64]
            arms = {}
            for tuned in choices(name, shape, count):
                try:
                    arms[str(tuned)] = Calls([partial(run, x, call, tuned) for call in calls])
                except Exception as problem:
                    print(name, count, tuned, repr(problem)[:200], flush=True)
            if not arms:
                continue
            times = sorted(compared(arms, rounds).items(), key=lambda item: item[1])
            results.append({"format": name, "shape": list(shape), "rows": count, "us": dict(times)})
            print(name, shape, count, [(key, round(us, 1)) for key, us in (*times[:4], times[-1])], flush=True)
            save(name_of_result, {"rows": results})
        del layer
        clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("table", "sweep"))
    parser.add_argument("--formats", default="4 bits,3 bits" if TINY else ",".join(FORMATS))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--name", help="of the result; gpu_layers or gpu_sweep")
    given = parser.parse_args()
    rows = [int(count) for count in given.rows.split(",")]
    work = table if given.what == "table" else sweep
    name = given.name or ("gpu_layers" if given.what == "table" else "gpu_sweep")
    work(given.formats.split(","), list(SHAPES[: given.shapes]), rows, given.rounds, name)


if __name__ == "__main__":
    main()

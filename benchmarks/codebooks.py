"""What the rank of a codebook is worth at equal bits, layer by layer: python -m benchmarks.codebooks.

Linears of a few blocks of SmolLM2-135M-Instruct off its 4-bit grid, on full-precision inputs. Errors are
`tr(E H E^T) / tr(W H W^T)` with the H of windows that nothing was fitted to, as geometric means over layers; `fitted`
with that of the windows that everything was fitted to: how far the two lie apart is overfitting.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.quality import degridded
from qcli.algorithms.layer_group import HESSIAN, LinearGroup
from qcli.algorithms.method import Method
from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.lcq import LCQ
from qcli.data.tokens import TokenRequest, calibration_tokens
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.statistics import StagedBlock, collect
from qcli.utils.device import has_fast_matmul, matmul_precision
from qcli.utils.stored_batches import BatchMemory

BLOCKS = (3, 14, 26)
WINDOWS, HELD_OUT = 64, 16
GROUPS = {1: (16, 24, 32, 48, 64, 96, 192), 2: (32, 48, 64, 96, 192), 3: (48, 64, 96, 192), 4: (64, 96, 192)}


def methods(bits: int) -> list[Method]:
    """Uniform grids with 16-bit tables, and codebooks of every rank that the bits allow."""
    shared: dict[str, Any] = {"bits": bits, "refit_target": False}
    uniform: list[Method] = [
        GPTQLike(**shared, group_size=group_size, zero_point=zero_point)
        for zero_point in ("float", "integer")
        for group_size in GROUPS[1]
    ]
    codebooks: list[Method] = [
        LCQ(**shared, group_size=group_size, rank=rank, table_bits=table_bits)
        for rank, sizes in GROUPS.items()
        for group_size in sizes
        for table_bits in ((8, 16) if rank == 1 else (8,))
        if rank < 1 << bits
    ]
    return uniform + codebooks


def moments(folder: str) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, weight, and H of the windows to fit and of those held out, of every linear of `BLOCKS`."""
    device, text = torch.device("cpu"), common.assets() / "text" / "wikitext2.valid.detok.txt"
    stream = ModelStream(open_source(folder), device=device, dtype=torch.float32)
    count = WINDOWS + HELD_OUT
    tokens = calibration_tokens(TokenRequest(str(text), samples=count, seq_len=512, seed=0), stream.source).ids
    found = []
    with torch.no_grad(), matmul_precision(fast=has_fast_matmul(device), device=device):
        memory = BatchMemory(device)
        hidden = memory.store(map(stream.embed, torch.split(tokens, 8)))
        for index in range(max(BLOCKS) + 1):
            block = stream.load_block(index)
            if index in BLOCKS:
                fit, rest = (slice(None, WINDOWS // 8), slice(WINDOWS // 8, None))
                sides = [
                    StagedBlock(stream, index, block, memory.store(hidden.waiting()[part])) for part in (fit, rest)
                ]
                for group in range(len(stream.family.groups)):
                    fitted, held = (collect(group, side, None, frozenset({HESSIAN})) for side in sides)
                    assert fitted.hessian is not None and held.hessian is not None
                    for path, weight in fitted.weights.items():
                        found.append((f"{index}.{path}", weight.clone(), fitted.hessian, held.hessian))
            stream.advance(block, index, hidden)
    return found


def measure(method: Method, layers: list[tuple[str, Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """One row: geometric means of relative errors, and bits per weight over all layers."""
    logs, bits, weights = [0.0, 0.0], 0.0, 0
    for name, weight, fitted, held in layers:
        solution = method.quantize(LinearGroup({name: weight}, fitted))[name].weight
        error = weight - solution.dense()
        for side, hessian in enumerate((held, fitted)):
            relative = ((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum()
            logs[side] += math.log(float(relative)) / len(layers)
        bits += method.format.bits_per_weight(solution.shape) * weight.numel()
        weights += weight.numel()
    options = method.model_dump(exclude_defaults=True)
    return {
        "name": method.name,
        "options": options,
        "bits_per_weight": bits / weights,
        "error": math.exp(logs[0]),
        "fitted": math.exp(logs[1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        layers = moments(degridded(common.smollm2(), Path(folder)))
        rows = []
        for bits in arguments.bits:
            for method in methods(bits):
                rows.append(measure(method, layers))
                print({key: round(value, 5) if isinstance(value, float) else value for key, value in rows[-1].items()})
    common.save("codebooks", {"protocol": __doc__, "blocks": BLOCKS, "rows": rows})


if __name__ == "__main__":
    main()

"""Seconds and peak memory of a block by each method, on random Llamas of the shapes of 8B, 70B and 135M parameters.

Blocks are alike, so a few stand for all. Training is cut to 20 steps. `blocks` are the seconds of each, the first with
whatever is compiled or warmed up; `seconds` those of the whole run, from the model's headers to the checkpoint. Within
a bound (--max-memory), activations wait in host memory if they must; `said` is what the plan expected.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import save
from benchmarks.gpu.models import TOKENS, make, measured, recipe
from qcli.quantization.quantize import quantize

BLOCKS = {"8B": 2, "70B": 1, "135M": 4}
LIMITS = {"8B": "8GB", "70B": "24GB", "135M": "2GB"}  # within which the methods must fit
BOUNDED = ("gptq-like", "refined", "lcq")
METHODS: dict[str, dict[str, Any]] = {
    "gptq-like": {"method__bits": 4, "method__group_size": 128},
    "refined": {"method__bits": 2, "method__group_size": 64, "refine__steps": 20},
    "lcq": {"method__name": "lcq", "method__bits": 2, "method__steps": 20},
    "dbllm": {"method__name": "dbllm"},
    "onebit": {"method__name": "onebit"},
    "rtn": {"method__name": "rtn", "method__bits": 4},
    "refined tables": {"method__bits": 2, "refine__steps": 20, "refine__train": ["tables"]},
    "teq": {"method__name": "teq", "method__steps": 20},
    "low rank": {"method__bits": 2, "low_rank__rank": 8},
    "gptq-like, not deterministic": {"method__bits": 4, "method__group_size": 128, "deterministic": False},
}


def arms(limit: str) -> dict[str, dict[str, Any]]:
    """Recipe fields by name, the important ones first."""
    named = list(METHODS)
    for name in BOUNDED:
        named.insert(named.index(name) + 1, f"{name}, within {limit}")
    return {name: METHODS.get(name) or METHODS[name.partition(", within")[0]] | {"max_memory": limit} for name in named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=BLOCKS)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further method begins")
    given = parser.parse_args()
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(folder, given.size, BLOCKS[given.size])
        print(f"written after {time.monotonic() - begun:.1f} s", flush=True)
        for method, fields in arms(LIMITS[given.size]).items():
            if time.monotonic() - begun > given.limit:
                break
            row = measured(partial(quantize, recipe(model, **fields), folder / method), "quantize")
            row["blocks"] = row.pop("units")[: BLOCKS[given.size]]
            rows.append({"size": given.size, "method": method, **row})
            print(rows[-1], flush=True)
            save(f"gpu_quantizing_{given.size}", {"what": __doc__, "tokens": TOKENS, "rows": rows})


if __name__ == "__main__":
    main()

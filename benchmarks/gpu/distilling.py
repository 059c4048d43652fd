"""Tokens per second of distillation by each loss, on a Llama of random weights of the shape of SmolLM2-135M.

8,192 tokens a step. The rate is that of the median step after the first three, in which things are compiled.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import TINY, save
from benchmarks.gpu.models import make, measured, recipe
from qcli.distillation.distill import distill
from qcli.quantization.quantize import quantize

BLOCKS, STEPS, WARM = 30, 10, 3
BATCH = 64 if TINY else 8192
LOSSES = ("kl", "onebit", "dad")
TRAINED = {"tables": ["tables"], "tables and weights": ["tables", "weights"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further training begins")
    given = parser.parse_args()
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(folder, "135M", BLOCKS)
        quantize(recipe(model, method__name="rtn", method__bits=2), folder / "student")
        for (what, train), loss in ((item, loss) for item in TRAINED.items() for loss in LOSSES):
            if time.monotonic() - begun > given.limit:
                break
            options = {"loss": loss, "train": train, "steps": STEPS, "judgements": 1, "batch_tokens": BATCH}
            plan = recipe(model, **{f"distill__{key}": value for key, value in options.items()})
            row = measured(partial(distill, folder / "student", plan, folder / f"{loss}-{len(train)}"), "train")
            if len(row["units"]) > WARM:
                row["tokens_per_s"] = round(BATCH / statistics.median(row["units"][WARM:]))
            rows.append({"loss": loss, "train": what, **row})
            print(rows[-1], flush=True)
            save("gpu_distilling", {"what": __doc__, "blocks": BLOCKS, "batch_tokens": BATCH, "rows": rows})


if __name__ == "__main__":
    main()

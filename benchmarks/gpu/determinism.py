"""Whether two processes on one GPU write the same bytes, with and without --deterministic, and what that costs.

Each process quantizes blocks of the shape of SmolLM2-135M, refines and distills them.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import save
from benchmarks.gpu.models import Model, make, recipe

BLOCKS = 2
METHODS: dict[str, dict[str, Any]] = {
    "gptq-like, refined": {"method__bits": 2, "refine__steps": 10, "calibration__samples": 16},
    "lcq": {"method__name": "lcq", "method__bits": 2, "method__steps": 10, "calibration__samples": 16},
}


def wrote(model: Model, fields: dict[str, Any], out: Path, deterministic: bool) -> dict[str, Any]:
    """The hash of what a process writes, and its seconds; or its error."""
    training = {"distill__steps": 5, "distill__judgements": 1, "distill__train": ["tables", "weights"]}
    plan = recipe(model, **fields, **training, deterministic=deterministic)
    file = out.with_suffix(".yaml")
    file.write_text(plan.to_yaml())
    begun = time.perf_counter()
    command = [sys.executable, "-m", "qcli", "run", str(file), "--out", str(out), "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": " ".join(done.stderr.splitlines()[-3:])}
    digest = hashlib.sha256()
    for weights in sorted((out / "distilled").glob("*.safetensors")):
        digest.update(weights.read_bytes())
    return {"sha256": digest.hexdigest(), "seconds": round(time.perf_counter() - begun, 1)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(folder, "135M", BLOCKS)
        for deterministic in (True, False):
            for method, fields in METHODS.items():
                runs = [wrote(model, fields, folder / f"{len(rows)}-{number}", deterministic) for number in range(2)]
                same = runs[0].get("sha256", "failed") == runs[1].get("sha256")
                rows.append({"method": method, "deterministic": deterministic, "same": same, "runs": runs})
                print(rows[-1], flush=True)
                save("gpu_determinism", {"what": __doc__, "rows": rows})


if __name__ == "__main__":
    main()

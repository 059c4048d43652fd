"""CPU time of lcq, refinement and gptq-like against another revision: python -m benchmarks.cpu_time REVISION

First blocks of SmolLM2-135M-Instruct as a bf16 folder, samples of 512 tokens, one thread. Each run is a process of its
own with the command's allocator, in turn with the other revision's; CPU seconds from the recipe to the checkpoint, the
least of all rounds, and what was lost: KL of the cut model on WikiText-2 test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.versus import bf16_folder

RUN = """
import json, sys, time
from qcli.cli.ui.session import Session
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
options, out = sys.argv[1:]
with Session(quiet=True):
    recipe, started = load_recipe(None, json.loads(options)), time.process_time()
    quantize(recipe, out)
print(json.dumps(time.process_time() - started))
"""


def arms(steps: int) -> dict[str, dict[str, Any]]:
    """Options of each."""
    lcq = {"method.name": "lcq", "method.group_size": 64, "method.steps": steps}
    gptq = {"method.name": "gptq-like", "method.bits": 2, "method.group_size": 64}
    return {
        "lcq, 2 bits g64": lcq | {"method.bits": 2},
        "lcq, 3 bits g32": lcq | {"method.bits": 3, "method.group_size": 32},
        "gptq-like, 2 bits g64, refined by block": gptq | {"refine.steps": steps},
        "gptq-like, 2 bits g64": gptq,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", help="of this repository, to compare with")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    text, here = common.assets() / "text", Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", arguments.revision], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        before, model = Path(folder) / "before", bf16_folder(Path(folder), arguments.blocks)
        subprocess.run(["git", "worktree", "add", "--detach", str(before), commit], cwd=here, check=True)
        try:
            flags: dict[str, Any] = {
                "model": model,
                "device": "cpu",
                "calibration.data": str(text / "wikitext2.valid.detok.txt"),
            }
            flags |= {"calibration.samples": arguments.samples, "calibration.seq_len": 512}
            score = ["--baseline", model, "--data", str(text / "wikitext2.test.detok.txt"), "--window", "512"]
            score += ["--max-windows", "10", "--json", "-q"]
            rows: dict[str, dict[str, Any]] = {}
            for name, options in arms(arguments.steps).items():
                seen: dict[str, list[float]] = {"before": [], "now": []}
                lost = {}
                for turn in range(arguments.rounds):
                    for side, tree in (("before", before), ("now", here)):
                        out = f"{folder}/{side}-{name}-{turn}"
                        seen[side].append(_run(tree, "-c", RUN, json.dumps(flags | options), out))
                        evaluation = _run(tree, "-m", "qcli", "eval", out, *score)
                        lost[side] = round(evaluation["kl"], 4)
                least = {side: min(seconds) for side, seconds in seen.items()}
                rows[name] = {
                    **{f"cpu_seconds_{side}": round(value, 1) for side, value in least.items()},
                    "ratio": round(least["now"] / least["before"], 3),
                    **{f"kl_{side}": value for side, value in lost.items()},
                }
                print(name, rows[name], flush=True)
                settings = {"before": commit, **vars(arguments)}
                common.save("cpu_time", {"what": __doc__, "settings": settings, "rows": rows})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=here, check=True)


def _run(tree: Path, *command: str) -> Any:
    """What a process of this tree prints, read as JSON."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()

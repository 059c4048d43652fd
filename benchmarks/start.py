"""What a command costs before it works: python -m benchmarks.start

CPU seconds of a process of `qcli quantize` on a model of two blocks until the first block is loaded, beyond those of
`import torch`, and the modules that it has imported by then: with the short imports of `qcli.utils.lean`, and without
them, as it was before. And wall and CPU time of commands that need no torch: `qcli --help`, `qcli recipe validate`,
`qcli quantize` with a group size that does not fit, and `qcli study` where every run has its row. Medians of rounds in
turn.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

from benchmarks import common
from qcli.utils.errors import UsageError
from tests.quantizing import write_text
from tests.tiny import tiny_model

ROUNDS = 7
_UNTIL_THE_FIRST_BLOCK = """
import json, os, sys, time
import torch
started = time.process_time()
import qcli.cli.main as program
if {whole}:
    program.import_little = lambda: None
program.import_little()
from qcli.quantization.sequential import Sequential

def first(self, index, saved):
    found = {{"cpu_seconds": time.process_time() - started, "modules": len(sys.modules)}}
    os.write(1, json.dumps(found).encode())
    os._exit(0)

Sequential.load = first
program.main(sys.argv[1:])
"""


def first_block(arguments: list[str], *, whole: bool) -> dict[str, float]:
    """CPU seconds beyond `import torch` and imported modules of one process.

    Args:
        whole: whether transformers imports all that it would by itself.
    """
    command = [sys.executable, "-c", _UNTIL_THE_FIRST_BLOCK.format(whole=whole), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def times(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU milliseconds of one process of `qcli`, bytecode cached, as it is after the first start; it may be
    one that refuses its arguments."""
    started, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-m", "qcli", *arguments], capture_output=True, check=False)
    assert run.returncode in (0, UsageError.exit_code), run.stderr.decode()
    after = getrusage(RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1000 * (time.perf_counter() - started), 1000 * cpu


def main() -> None:
    commands = {"qcli --help": ["--help"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text("model: m\nmethod: {name: gptq-like, bits: 3}\ncalibration: {data: text.txt}\n")
        commands["qcli recipe validate"] = ["recipe", "validate", str(recipe)]
        model, text = tiny_model("llama", folder), write_text(folder)
        quantize = ["quantize", str(model), "--data", str(text), "--samples", "2", "--seq-len", "16", "--quiet"]
        commands["qcli quantize, a wrong group size"] = [*quantize, "--group-size", "48"]
        study = folder / "study.yaml"
        study.write_text(
            f"base: {{model: {model}, method: {{name: rtn, group_size: 32}}, "
            f"eval: {{perplexity: [{text}], window: 64, max_windows: 1}}}}\ngrid: {{method.bits: [3, 4]}}\n"
        )
        commands["qcli study, nothing to do"] = ["study", str(study), "--out", str(folder / "study")]
        quantize += ["--device", "cpu", "--group-size", "32"]
        blocks: dict[str, list[dict[str, float]]] = {"short imports": [], "all imports": []}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(ROUNDS + 1):  # the first round fills the caches
            for arm, rows in blocks.items():
                out = ["--out", str(folder / f"{arm}-{turn}".replace(" ", "-"))]
                row = first_block(quantize + out, whole=arm == "all imports")
                rows.extend([row] if turn else [])
            for command, pairs in found.items():
                pair = times(commands[command])
                pairs.extend([pair] if turn else [])
    result: dict[str, Any] = {"what": __doc__, "rounds": ROUNDS}
    result["quantize until the first block"] = {
        arm: {
            "cpu_seconds_beyond_torch": round(statistics.median(row["cpu_seconds"] for row in rows), 2),
            "modules": round(statistics.median(row["modules"] for row in rows)),
        }
        for arm, rows in blocks.items()
    }
    result["milliseconds"] = {
        command: {
            what: {"median": round(statistics.median(values)), "best": round(min(values))}
            for what, values in zip(("wall", "cpu"), zip(*pairs, strict=True), strict=True)
        }
        for command, pairs in found.items()
    }
    print(common.save("start", result).read_text())


if __name__ == "__main__":
    main()

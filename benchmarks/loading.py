"""Loading packed checkpoints: python -m benchmarks.loading

SmolLM2-135M-Instruct and a Llama of 1.1 billion random weights, in bf16 and packed by rtn in 4 bits. Every load is a
process of its own; dense and packed ones take turns, with the files in the system's cache and without. Seconds are
medians, of `from_pretrained` and of qcli's `load_model`, imports not counted, until every page has been read, as
transformers only maps the files. Held bytes are those of parameters and buffers, compared with all tensors in the
files; the peak is the process's resident memory above that before loading, after every page has been read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.memory import write_llama
from qcli.models.manifest import MANIFEST
from qcli.utils.safetensors import read_header

BLOCKS = 16  # of the larger model
ARMS = ("dense, transformers", "packed, transformers", "packed, load_model")
_LOAD = """
import json, sys, time
import torch
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM
import qcli
from qcli.inference.load import load_model, tensor_bytes
from qcli.models.open import open_source

def resident(which):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(which)))

transformers.utils.logging.disable_progress_bar()
folder, arm = sys.argv[1:]
before, started = resident("VmRSS"), time.perf_counter()
if arm.endswith("load_model"):
    model = load_model(open_source(folder), torch.device("cpu"), torch.bfloat16)
else:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
returned = time.perf_counter() - started
for tensor in (*model.parameters(), *model.buffers()):
    tensor.detach().flatten().view(torch.uint8)[::4096].sum()
seconds = time.perf_counter() - started
peak = resident("VmHWM") - before
print(json.dumps({"returned": returned, "seconds": seconds, "peak": peak, "held": tensor_bytes(model)}))
"""


def loaded(folder: Path, arm: str) -> dict[str, Any]:
    """What one process reports of one load."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(folder), arm], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def forget(folder: Path) -> None:
    """Take a folder's files out of the system's cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def row(name: str, dense: Path, packed: Path, rounds: int) -> dict[str, Any]:
    """Medians of interleaved rounds."""
    folders = {arm: dense if arm.startswith("dense") else packed for arm in ARMS}
    cold: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    warm: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm, folder in folders.items():
            forget(folder)
            cold[arm].append(loaded(folder, arm))
            warm[arm].append(loaded(folder, arm))
    result: dict[str, Any] = {"model": name, "weights": tensor_bytes(dense) // 2, "rounds": rounds}
    for arm, folder in folders.items():
        held, stored = warm[arm][0]["held"], tensor_bytes(folder)
        result[arm] = {
            "seconds_uncached": median(cold[arm], "seconds"),
            "seconds_cached": median(warm[arm], "seconds"),
            "returned_after_cached": median(warm[arm], "returned"),
            "file_mb": round(stored / 1e6, 1),
            "held_mb": round(held / 1e6, 1),
            "held_to_file": round(held / stored, 4),
            "peak_mb": round(median(warm[arm], "peak") / 1e6, 1),
        }
    return result


def median(found: list[dict[str, Any]], what: str) -> float:
    """Of one number of several loads."""
    return round(float(statistics.median(one[what] for one in found)), 3)


def tensor_bytes(folder: Path) -> int:
    """Of all tensors in a folder's files."""
    return sum(extent.bytes for file in folder.glob("*.safetensors") for extent in read_header(file).values())


def quantize(model: str, out: Path) -> None:
    """In 4 bits, groups of 32 (576 does not divide by 128)."""
    command = [str(Path(sys.executable).parent / "qcli"), "quantize", model, "--method", "rtn", "--bits", "4"]
    subprocess.run([*command, "--group-size", "32", "--out", str(out), "-q"], check=True)


def smollm2(folder: Path) -> tuple[Path, Path]:
    """The dense folder in bf16 and the packed one."""
    qcli = str(Path(sys.executable).parent / "qcli")
    quantize(common.smollm2(), folder / "smollm2-4bit")
    command = [qcli, "pack", str(folder / "smollm2-4bit"), "--format", "dense", "--out", str(folder / "smollm2"), "-q"]
    subprocess.run(command, check=True)
    return folder / "smollm2", folder / "smollm2-4bit"


def random_llama(folder: Path) -> tuple[Path, Path]:
    """The dense folder in bf16 and the packed one."""
    write_llama(folder / "llama", BLOCKS)
    quantize(str(folder / "llama"), folder / "llama-4bit")
    return folder / "llama", folder / "llama-4bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama"])
    parser.add_argument("--folder", type=Path, help="keep the models here")
    given = parser.parse_args()
    makers = {"smollm2": smollm2, "llama": random_llama}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        for name in given.models:
            done = folder / f"{name}-4bit" / MANIFEST
            dense, packed = (folder / name, folder / f"{name}-4bit") if done.exists() else makers[name](folder)
            found = row(name, dense, packed, given.rounds)
            print(json.dumps(found, indent=1), flush=True)
            common.save_row("loading", ("model",), found, __doc__)


if __name__ == "__main__":
    main()

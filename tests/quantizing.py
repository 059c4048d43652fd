"""What the tests of quantizing share: a text, a run on a tiny model, and what to look at afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization import job
from qcli.quantization.quantize import quantize
from qcli.quantization.result import Result
from qcli.recipe.load import load_recipe
from qcli.utils import run_folder
from qcli.utils.stored_batches import BatchMemory

TOKENS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(7))


def write_text(folder: Path) -> Path:
    """A file of text to calibrate on."""
    file = folder / "text.txt"
    file.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400)))
    return file


def run(model: Path, out: Path, text: Path | None = None, *, grouped: bool = True, **flags: Any) -> Result:
    """Quantize, in groups of 32 unless the method knows none; `flags` are recipe fields, `__` for the dots."""
    given: dict[str, Any] = {"model": str(model)} | ({"method.group_size": 32} if grouped else {})
    if text is not None:
        given |= {"calibration.data": str(text), "calibration.samples": 6, "calibration.seq_len": 32}
    recipe = load_recipe(None, given | {key.replace("__", "."): value for key, value in flags.items()})
    return quantize(recipe, out)


def logits(folder: Path) -> torch.Tensor:
    """Of a folder, loaded as any transformers user would."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output: torch.Tensor = model(TOKENS).logits
    return output


def streamed(folder: Path) -> torch.Tensor:
    """Logits of a folder through the stream that calibration and evaluation use."""
    stream = ModelStream(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        return stream.logits_of(TOKENS)


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint but its manifest, which tells the time."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "qcli.manifest.json"}


def keep_on_host(monkeypatch: pytest.MonkeyPatch) -> list[BatchMemory]:
    """From now on, the activations of a quantization wait in host memory; the list gets that of each run."""
    used: list[BatchMemory] = []

    def on_host(device: torch.device, **_: bool) -> BatchMemory:
        used.append(BatchMemory(device, on_host=True))
        return used[-1]

    monkeypatch.setattr(job, "BatchMemory", on_host)
    return used


def in_pieces(work: Callable[[], object], out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Do `work`, which writes `out`, with an interruption after every part it commits; how many there were."""
    commit = run_folder.RunFolder.commit
    done: set[str] = set()

    class Stop(Exception):
        pass

    def commit_and_stop(run: run_folder.RunFolder, part: str, *arguments: Any) -> None:
        commit(run, part, *arguments)
        if part not in done or part.startswith("state"):
            done.add(part)
            raise Stop

    monkeypatch.setattr(run_folder.RunFolder, "commit", commit_and_stop)
    stops = 0
    while not out.exists():
        try:
            work()
        except Stop:
            stops += 1
            assert stops < 50
    return stops

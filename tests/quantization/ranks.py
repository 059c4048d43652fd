"""What each process of `torchrun` runs for test_processes.py.

`FOLDER`: FOLDER/jobs.json has recipe fields by name; each is quantized to FOLDER/NAME, or goes through all stages there
if it has an evaluation. Every process notes, for each block that it commits, what it holds and how often it has
communicated since the block before.

`FOLDER fail ARGUMENTS...`: the command line with these arguments; in the second process, the second block fails.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qcli.cli.main import main as command_line
from qcli.pipeline.stages import Pipeline
from qcli.quantization.block_parts import BlockParts
from qcli.quantization.block_state import BlockState
from qcli.quantization.quantize import quantize
from qcli.quantization.sequential import Sequential
from qcli.recipe.load import load_recipe
from qcli.utils.cache import Cache
from qcli.utils.distributed import is_main_process, process_group
from qcli.utils.errors import UsageError

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "barrier", "broadcast_object_list", "send", "recv")


def quantize_all(folder: Path) -> None:
    """Quantize all jobs, with notes of each block."""
    counts: Counter[str] = Counter()
    notes: dict[str, list[dict[str, Any]]] = {}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))
    commit = BlockParts.commit

    def noted(parts: BlockParts, block: BlockState) -> None:
        digest = hashlib.sha256()
        for weight in block.weights.values():
            for tensor in (weight.codes, *weight.tables.values()):
                digest.update(tensor.contiguous().numpy().tobytes())
        notes[job].append({"block": block.index, "holds": digest.hexdigest(), "calls": dict(counts)})
        counts.clear()
        commit(parts, block)

    BlockParts.commit = noted  # type: ignore[method-assign,assignment]
    with process_group(torch.device("cpu")) as processes:
        for job, fields in json.loads((folder / "jobs.json").read_text()).items():
            notes[job] = []
            counts.clear()
            recipe = load_recipe(None, fields)
            if recipe.eval is None:
                quantize(recipe, folder / job)
            else:
                Pipeline(recipe, folder / job, cache=Cache(None), processes=processes).run()
    (folder / f"notes-{0 if is_main_process() else 1}.json").write_text(json.dumps(notes))


def fail(arguments: list[str]) -> None:
    """Run a command of which one process meets an error that the other does not."""
    solve = Sequential.solve

    def failing(self: Sequential, block: BlockState, collected: Any) -> Any:
        if block.index == 1 and not is_main_process():
            raise UsageError("the second process has a problem", hint="of its own")
        return solve(self, block, collected)

    Sequential.solve = failing  # type: ignore[method-assign]
    command_line(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2:3] == ["fail"]:
        fail(sys.argv[3:])
    else:
        quantize_all(Path(sys.argv[1]))

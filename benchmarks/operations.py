"""Tensor operations and the bytes they move: python -m benchmarks.operations

On a GPU every operation of a small tensor costs a launch, 5-10 us whatever its size, and every operation of a large one
costs the bytes that it moves. Both can be counted on a CPU, exactly. Counted on a random Llama of two blocks of seven
linears each: the second block, quantized by each method; one training step of reconstruction, of TEQ and of
distillation, forward pass and loss included; error feedback on a weight of 256 columns; and fake quantization of 2^16
weights to bfloat16, forward and backward. Views and allocations are
no operations, a Triton kernel is one: ", with kernels" is what a GPU does, run by Triton's interpreter. Bytes are those
of the inputs and outputs of every operation. A synchronization is an operation that waits for a value: on a GPU it
empties the queue.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # read when Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from qcli.algorithms.solvers.feedback import quantize_columns
from qcli.core.formats.affine import Affine
from qcli.core.formats.codebook import Codebook
from qcli.core.formats.dual_binary import DualBinary
from qcli.core.formats.sign import Sign
from qcli.core.weight import Format
from qcli.distillation.distill import distill
from qcli.quantization.quantize import quantize
from qcli.recipe.load import load_recipe
from qcli.recipe.recipe import Recipe
from qcli.utils import triton_kernels
from qcli.utils.progress import Progress
from tests.inference.weights import random_weight
from tests.quantizing import write_text
from tests.tiny import tiny_model

LINEARS, BLOCKS = 7, 2  # of a block; of the model
_STEPS, _EVALUATIONS = 12, 10  # so that a few steps are not followed by an evaluation
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"} | {
    "_record_function_enter_new",
    "_record_function_exit",
}
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method.name": "rtn"},
    "gptq-like": {"method.name": "gptq-like"},
    "gptq-like, 2 bits": {"method.name": "gptq-like", "method.bits": 2, "method.zero_point": "float"},
    "onebit": {"method.name": "onebit"},
    "dbllm": {"method.name": "dbllm"},
    "lcq, 20 steps": {"method.name": "lcq", "method.bits": 2, "method.steps": 20},
}
STEPS: dict[str, dict[str, Any]] = {
    "refinement, tables": {"method.name": "rtn", "refine.train": ["tables"], "refine.steps": _STEPS},
    "refinement, tables and weights": {
        "method.name": "rtn",
        "refine.train": ["tables", "weights"],
        "refine.steps": _STEPS,
    },
    "TEQ": {"method.name": "teq", "method.steps": _STEPS},
}
DISTILLATION: dict[str, dict[str, Any]] = {
    f"{loss}, {' and '.join(train)}": {"distill.loss": loss, "distill.train": train}
    for loss in ("kl", "dad", "onebit")
    for train in (["tables"], ["tables", "weights"])
}
FEEDBACK: dict[str, Format] = {
    "affine": Affine(bits=3, group_size=32),
    "codebook": Codebook(bits=2, group_size=32, rank=1, table_bits=16),
}
COLUMNS = 256
TRAINED: dict[str, Format] = {
    "affine": Affine(bits=3, group_size=32, zero_point="float"),
    "codebook": Codebook(bits=2, group_size=32, rank=1, table_bits=16),
    "dual-binary": DualBinary(group_size=32),
    "sign": Sign(),
}
_KERNELS = ", with kernels"
NAMES = (
    *(f"error feedback: {name}{kernels}" for name in FEEDBACK for kernels in ("", _KERNELS)),
    *(f"fake quantization: {name}{kernels}" for name in TRAINED for kernels in ("", _KERNELS)),
    *(f"block: {name}" for name in METHODS),
    *(f"step: {name}" for name in STEPS),
    *(f"distillation step: {name}" for name in DISTILLATION),
)


@dataclass(frozen=True)
class Count:
    """What was done.

    Attributes:
        operations: but views and allocations.
        bytes: of their inputs and outputs.
        synchronizations: those among them that wait for a value.
    """

    operations: int
    bytes: int
    synchronizations: int

    def __sub__(self, other: Count) -> Count:
        return Count(*(getattr(self, name) - getattr(other, name) for name in asdict(self)))


class Counting(TorchDispatchMode):
    """Counts the operations below autograd while it is open.

    Attributes:
        by_name: number of operations by name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        if name not in _FREE and not func.is_view:
            self.by_name[name] += 1
            self.bytes += sum(map(moved, tree_leaves((args, kwargs, output))))
        return output

    def now(self) -> Count:
        """The count so far."""
        waits = sum(self.by_name[name] for name in _WAITING)
        return Count(self.by_name.total(), self.bytes, waits)


def moved(value: object) -> int:
    """Bytes of a tensor's elements, each once where it is expanded; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    elements = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * value.element_size()


def marks(run: Callable[[Progress], object]) -> dict[tuple[str, int], Count]:
    """The count at each call of the progress that `run` reports, by stage and units done."""
    found: dict[tuple[str, int], Count] = {}
    with Counting() as counting:

        def progress(stage: str, done: int, total: int, detail: str = "") -> None:
            found[stage, done] = counting.now()

        run(progress)
    return found


def one_step(found: dict[tuple[str, int], Count]) -> Count:
    """One training step without evaluation: the count of most of them."""
    trained = {key: count for key, count in found.items() if "train" in key[0]}
    steps = [after - before for (_, before), (_, after) in pairwise(sorted(trained.items()))]
    return min(steps, key=lambda step: step.operations)


def recipe(model: Path, text: Path, fields: Mapping[str, Any]) -> Recipe:
    """Eight sequences of 32 tokens; groups of 32 weights, unless the method knows none."""
    given: dict[str, Any] = {"model": str(model), "device": "cpu"}
    given |= {"calibration.data": str(text), "calibration.samples": 8, "calibration.seq_len": 32}
    if fields["method.name"] != "onebit":
        given["method.group_size"] = 32
    return load_recipe(None, {**given, **fields})


def measure(name: str, folder: Path) -> dict[str, float]:
    """One of `NAMES`, counted with one thread in an empty folder, as the result keeps it."""
    kind, _, key = name.removesuffix(_KERNELS).partition(": ")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kernels = mock.patch.object(triton_kernels, "DEVICES", {"cpu"} if name.endswith(_KERNELS) else set())
    try:
        with kernels:
            count, by_parts = _count(kind, key, folder)
    finally:
        torch.set_num_threads(threads)
    return {
        "operations": count.operations,
        **by_parts,
        "bytes": count.bytes,
        "synchronizations": count.synchronizations,
    }


def _count(kind: str, key: str, folder: Path) -> tuple[Count, dict[str, float]]:
    """And what it is by parts."""
    if kind == "error feedback":
        count = _feedback(FEEDBACK[key])
        return count, {"operations_per_column": round(count.operations / COLUMNS, 1)}
    if kind == "fake quantization":
        count = _fake_quantization(TRAINED[key])
        return count, {"bytes_per_weight": round(count.bytes / (512 * 128), 1)}
    model, text = tiny_model("llama", folder), write_text(folder)
    if kind == "distillation step":
        student = folder / "student"
        quantize(recipe(model, text, METHODS["rtn"]), student)
        training = {**METHODS["rtn"], **DISTILLATION[key]}
        plan = recipe(model, text, {**training, "distill.steps": _STEPS, "distill.judgements": _EVALUATIONS})
        step = one_step(marks(lambda progress: distill(student, plan, folder / "out", progress)))
        return step, {"operations_per_linear": round(step.operations / LINEARS / BLOCKS, 1)}
    plan = recipe(model, text, METHODS[key] if kind == "block" else STEPS[key])
    found = marks(lambda progress: quantize(plan, folder / "out", progress))
    block = found["quantize", BLOCKS] - found["quantize", BLOCKS - 1] if kind == "block" else one_step(found)
    return block, {"operations_per_linear": round(block.operations / LINEARS, 1)}


def _feedback(format: Format) -> Count:
    weight = random_weight(format, (16, COLUMNS))
    arguments = weight.dense(), torch.eye(COLUMNS), torch.arange(COLUMNS), format, [(16, weight.tables)]
    counting = Counting()
    with counting:
        quantize_columns(*arguments)
    return counting.now()


def _fake_quantization(format: Format) -> Count:
    weight = random_weight(format, (512, 128))
    tables = {name: table.requires_grad_() for name, table in format.float_tables(weight.tables).items()}
    latents, units = format.trained_latents(weight, weight.dense())
    gradient = torch.zeros(512, 128, dtype=torch.bfloat16)
    counting = Counting()
    with counting:
        format.fake_quantize(latents.requires_grad_(), units, tables, torch.bfloat16).backward(gradient)
    return counting.now()


def main() -> None:
    found = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(name, Path(folder))
            print(f"{name:50} {found[name]}", flush=True)
    common.save("operations", {"what": __doc__, "counts": found})


if __name__ == "__main__":
    main()

"""Device memory of quantizing large models, counted without a GPU: python -m benchmarks.device_memory

The first block of a model with the shapes of Llama 3, quantized by qcli's own code on tensors that have no values
(`live_memory`), activations in host memory, against the estimate that `qcli quantize` decides by. A few samples do:
what does not wait for its next use does not depend on their number. Computed, not measured on a GPU: what kernels use
inside, what the allocator loses to fragments and the CUDA context come on top.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.live_memory import DEVICE, HOST, counted
from qcli.core.formats.affine import Affine
from qcli.core.weight import QuantizedWeight
from qcli.distillation import blockwise
from qcli.distillation.footprint import distillation_demand
from qcli.distillation.job import DistillationJob
from qcli.distillation.whole_model import distill_model
from qcli.models.quantized import LayerStorage
from qcli.models.sizes import ModelSizes
from qcli.models.source import ModelSource
from qcli.quantization import transforms
from qcli.quantization.block_loop import BlockQuantizer
from qcli.quantization.block_state import BlockState
from qcli.quantization.data_free import DataFree
from qcli.quantization.footprint import quantization_demand
from qcli.quantization.plan import Plan, make_plan
from qcli.quantization.ranks import ALONE
from qcli.quantization.sequential import Sequential
from qcli.recipe.distillation import Distillation
from qcli.recipe.load import load_recipe
from qcli.utils.device import matmul_precision
from qcli.utils.progress import silent
from qcli.utils.stored_batches import BatchMemory

SIZES = {  # hidden, inner, heads
    "1B": (2048, 8192, 32),
    "8B": (4096, 14336, 32),
    "70B": (8192, 28672, 64),
}
VOCABULARY, KV_HEADS, LENGTH, SAMPLES = 128256, 8, 2048, 3
CASES: dict[str, dict[str, Any]] = {
    "rtn": {"method.name": "rtn"},
    "gptq-like": {"method.name": "gptq-like"},
    "gptq-like, refined": {"method.name": "gptq-like", "refine.steps": 2},
    "teq": {"method.name": "teq", "method.steps": 2},
    "lcq": {"method.name": "lcq", "method.bits": 2, "method.steps": 2},
    "onebit": {"method.name": "onebit"},
    "dbllm": {"method.name": "dbllm"},
}
BLOCKS = {"1B": 16, "8B": 32, "70B": 80}
TRAINED: dict[str, dict[str, Any]] = {
    "tables": {"train": ["tables"]},
    "tables, cached predictions": {"train": ["tables"], "teacher_top_k": 128},
    "weights by blocks": {"train": ["tables", "weights"], "scope": "block"},
}
CPU = torch.device("cpu")


def write_headers(folder: Path, size: str, blocks: int = 2) -> Path:
    """A model whose file of weights is a hole behind its header."""
    hidden, inner, heads = SIZES[size]
    kv = hidden // heads * KV_HEADS
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": blocks}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads, "dtype": "bfloat16"}
    config |= {"num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    shapes: dict[str, tuple[int, ...]] = {"lm_head": (VOCABULARY, hidden), "model.norm": (hidden,)}
    shapes |= {"model.embed_tokens": (VOCABULARY, hidden)}
    linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
    linears |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    linears |= {"mlp.down_proj": (hidden, inner)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    for block in range(blocks):
        shapes |= {f"model.layers.{block}.{name}": shape for name, shape in (linears | norms).items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return folder


class _Parts:
    """A run's folder in memory."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[dict[str, Tensor], Any]] = {}

    def done(self, part: str) -> str | None:
        return part if part in self.parts else None

    def file(self, part: str) -> str:
        return part

    def report(self, part: str) -> Any:
        return self.parts[part][1]

    def commit(self, part: str, tensors: dict[str, Tensor], report: Any = None) -> None:
        self.parts[part] = tensors, report


@dataclass
class Phase:
    """One phase of a block.

    Attributes:
        peak: highest bytes of the device.
        waiting: bytes of activations in host memory at its end.
        largest: tensors of the device at its peak: bytes, and the operation that made them.
    """

    peak: int = 0
    waiting: int = 0
    largest: list[tuple[int, str]] = field(default_factory=list)


def phases(plan: Plan, *, fast: bool) -> dict[str, Phase]:
    """The first block, phase by phase."""
    found: dict[str, Phase] = {}
    run: Any = _Parts()
    block: BlockState | None = None
    with (
        counted(fake=True) as live,
        mock.patch.object(transforms, "load_file", lambda part: run.parts[part][0]),
        matmul_precision(fast=False),
        torch.no_grad(),
    ):

        def ended(phase: str) -> None:
            known = found.setdefault(phase, Phase())
            targets = sum(target.nbytes for target in block.targets.values()) if block is not None else 0
            known.waiting = max(known.waiting, live.now[HOST] - targets)
            if live.peak[DEVICE] >= known.peak:
                known.peak, known.largest = live.peak[DEVICE], live.largest
            live.restart()

        tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
        quantizer: BlockQuantizer = DataFree(plan, CPU)
        if plan.calibrated:
            memory = BatchMemory(CPU, on_host=True)
            quantizer = Sequential(plan, run, tokens, CPU, torch.float32, fast=fast, memory=memory, progress=silent)
        ended("embed")
        block = quantizer.load(0, None)
        ended("load")
        quantizer.transform(block)
        ended("transform")
        for group in block.groups:
            for collected in quantizer.collect(block, group):
                ended("collect")
                block.replace(quantizer.solve(block, collected))
                del collected
                ended("solve")
        quantizer.advance_original(block)
        ended("advance")
        quantizer.refine(block)
        ended("refine")
        quantizer.advance(block)
        ended("advance")
    return found


def measure(size: str, case: str, folder: Path, *, fast: bool, largest: bool) -> dict[str, Any]:
    """One row of the table; prints the largest tensors of each phase if `largest`."""
    model, text = folder / size, folder / "text.txt"
    if not model.exists():
        write_headers(model, size)
        text.write_text("text")
    given: dict[str, Any] = {"model": str(model), "device": "cpu", "calibration.data": str(text)}
    given |= {"calibration.samples": SAMPLES, "calibration.seq_len": LENGTH, "calibration.held_out": 1}
    plan = make_plan(load_recipe(None, {**given, **CASES[case]}))
    found = phases(plan, fast=fast)
    for name, phase in found.items() if largest else ():
        print("  ", name, [(_gb(size), made) for size, made in phase.largest[:14]])
    peak = max(phase.peak for phase in found.values())
    waiting = max(found[phase].waiting for phase in ("collect", "solve"))
    demand = quantization_demand(plan, torch.float32, fast=fast)
    samples = 128 / SAMPLES
    return {
        "size": size,
        "case": case,
        "matrix_products": "bf16" if fast else "float32",
        "device_gb": _gb(peak),
        "estimate_gb": _gb(demand.device),
        "estimate_off": round(demand.device / peak - 1, 3),
        "host_activations_gb_at_128_samples": _gb(waiting * samples),
        "estimated_host_activations_gb": _gb(demand.waiting * samples),
        "phases_gb": {name: _gb(phase.peak) for name, phase in found.items()},
    }


class _Student:
    """A quantized checkpoint of a model, without values."""

    def __init__(self, original: ModelSource, quantized: dict[str, LayerStorage]) -> None:
        self.original, self.quantized, self.extents = original, quantized, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def read_quantized(self, name: str) -> QuantizedWeight:
        format, (rows, columns) = self.quantized[name].format, self.quantized[name].shape
        assert isinstance(format, Affine)
        tables = {"weight_scale": torch.float16, "weight_zero_point": torch.uint8}
        groups = {table: torch.empty(rows, format.groups(columns), dtype=dtype) for table, dtype in tables.items()}
        return QuantizedWeight(format, (rows, columns), torch.empty(rows, columns, dtype=torch.uint8), groups)


def distilled_peak(options: Distillation, source: ModelSource, layers: dict[str, LayerStorage]) -> int:
    """Bytes at the peak of two training steps and their evaluations, hidden states of blocks in host memory; of a whole
    model without its loading, so that it grows evenly with the number of blocks."""

    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        if options.scope == "model" and (stage, done) == ("train", 0):
            live.restart()

    run: Any = _Parts()
    student: Any = _Student(source, layers)
    with (
        counted(fake=True) as live,
        mock.patch.object(blockwise, "load_file", lambda part: run.parts[part][0]),
        matmul_precision(fast=False),
        torch.no_grad(),
    ):
        job = DistillationJob(
            student=student,
            teacher=source,
            tokens=torch.zeros(SAMPLES, LENGTH, dtype=torch.int64),
            held_out=1,
            options=options,
            seed="",
            device=CPU,
            dtype=torch.float32,
            fast=True,
            progress=progress,
            on_host=True,
        )
        if options.scope == "block":
            blockwise.distill_blocks(job, run)
        else:
            distill_model(job, run, Path(), ALONE)
    return live.peak[DEVICE]


def distillation(size: str, trained: str, folder: Path) -> dict[str, Any]:
    """What `qcli distill` decides by on a GPU with bf16 units, for a student of 4 bits g64; and what is counted, not
    with cached predictions. A whole model is counted at two and four blocks, to which the others add in proportion."""
    options = Distillation.model_validate({**TRAINED[trained], "steps": 2})
    row: dict[str, Any] = {"size": size, "case": f"distill: {trained}", "matrix_products": "bf16"}
    text, counts, whole = folder / "text.txt", list[int](), BLOCKS[size]
    text.write_text("text")
    for blocks in (2, 4):
        model = folder / f"{size}-{blocks}"
        if not model.exists():
            write_headers(model, size, blocks)
        given = {"model": str(model), "device": "cpu", "calibration.data": str(text), "method.name": "rtn"}
        plan = make_plan(load_recipe(None, given))
        formats = {layer.name: (plan.formats[layer.name], layer.shape) for layer in plan.layers}
        layers = {name: LayerStorage(format, shape) for name, (format, shape) in formats.items() if format is not None}
        if options.teacher_top_k is None and (blocks == 2 or options.scope == "model"):
            counts.append(distilled_peak(options, plan.source, layers))
    demand = distillation_demand(
        options,
        plan.recipe.distill_text,
        ModelSizes.of(plan.source),
        [*layers.values()] * (whole // blocks),
        vocabulary=VOCABULARY,
        itemsize=4,
        fast=True,
        processes=1,
        shared=True,
        device="cuda",
    )
    if counts:
        peak = counts[0] + (counts[-1] - counts[0]) * (whole - 2) // 2
        row |= {"device_gb": _gb(peak), "estimate_off": round(demand.device / peak - 1, 3)}
    return row | {"estimate_gb": _gb(demand.device), "estimated_host_activations_gb": _gb(demand.waiting)}


def _gb(size: float) -> float:
    return round(size / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--trained", nargs="*", default=list(TRAINED), choices=TRAINED)
    parser.add_argument("--float32", action="store_true", help="matrix products, as with --dtype float32")
    parser.add_argument("--largest", action="store_true", help="print the largest tensors of each phase")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            rows = (distillation(size, trained, Path(folder)) for trained in options.trained)
            counted_rows = (
                measure(size, case, Path(folder), fast=not options.float32, largest=options.largest)
                for case in options.cases
            )
            for row in itertools.chain(rows, counted_rows):
                print(row, flush=True)
                common.save_row("device_memory", ("size", "case", "matrix_products"), row, __doc__)


if __name__ == "__main__":
    main()

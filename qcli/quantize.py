"""The main verb: read a model block by block, choose codes, write a checkpoint that loads."""

from __future__ import annotations

import copy
import hashlib
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcli import __version__, checkpoint, shards
from qcli.compute import has_fast_matmul, matmul_precision, resolve_device, resolve_dtype
from qcli.data import calibration_tokens
from qcli.errors import QcliError
from qcli.memory import peak_memory
from qcli.method import CROSS, RESIDUAL_CROSS, LinearGroup, Method, Solution
from qcli.models.arch import Linear
from qcli.models.headers import read_header
from qcli.models.moments import StagedBlock, gather
from qcli.models.source import Source
from qcli.models.stream import ModelStream
from qcli.plan import SHARD_SIZE, Plan, plan
from qcli.progress import Progress, silent
from qcli.quantized import QuantizedWeight
from qcli.recipe import Recipe
from qcli.run_folder import RunFolder

BATCH_TOKENS = 4096  # tokens that run through a block at a time
_TOKENS, _OUTSIDE = "tokens", "outside"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        error: relative squared error; of the output on the layer's real inputs against what it was asked to give
            (`measure: output`), or of the weight itself where no data was used (`measure: weight`).
        fallbacks: every step that did not go as configured.
    """

    name: str
    method: str
    spec: dict[str, Any]
    bits_per_weight: float
    error: float
    measure: str
    fallbacks: list[str]


@dataclass(frozen=True)
class Result:
    """A finished checkpoint."""

    out: Path
    plan: Plan
    layers: list[LayerReport]
    tokens_sha256: str | None
    seconds: float
    peak_memory: dict[str, int]
    resumed_blocks: int = 0
    dense: list[str] = field(default_factory=list)

    @property
    def fallbacks(self) -> dict[str, list[str]]:
        """By layer, where there were any."""
        return {layer.name: layer.fallbacks for layer in self.layers if layer.fallbacks}

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "out": str(self.out),
            "model": self.plan.recipe.model,
            "bits_per_weight": self.plan.bits_per_weight,
            "model_bits_per_weight": self.plan.model_bits_per_weight,
            "bytes": self.plan.bytes,
            "source_bytes": self.plan.source.bytes(),
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "resumed_blocks": self.resumed_blocks,
            "fallbacks": self.fallbacks,
            "dense": self.dense,
            "layers": [asdict(layer) for layer in self.layers],
        }


def quantize(recipe: Recipe, progress: Progress = silent) -> Result:
    """Quantize a model as the recipe says; `recipe.out` appears complete or not at all.

    Interrupted, it leaves `OUT.partial`; the same call continues there and gives the same bytes.

    Raises:
        UsageError: the recipe does not fit the model, or the data is not usable.
        StateError: the output exists or belongs to another run.
        ResourceError: no space.
    """
    assert recipe.out is not None
    started = time.monotonic()
    todo, out = plan(recipe), Path(recipe.out)
    device, dtype = resolve_device(recipe.device), resolve_dtype(recipe.dtype)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    identity = {
        "versions": versions(),
        "compute": {"device": device.type, "bf16": fast},
        "source": {"headers": todo.source.fingerprint(), "modified": _modified(todo.source.path)},
        "data": _data_sha256(recipe.calibration.data) if todo.streamed else None,
        "recipe": recipe.fingerprint_fields(),
    }
    with RunFolder(out, identity, recipe.resume) as run:
        shards.require_space(out, 2 * todo.bytes - run.size())
        tokens = _tokens(todo, run, device, progress) if todo.streamed else None
        with matmul_precision(fast=False), torch.no_grad():
            solver = _Streamed(todo, tokens, device, dtype, fast) if tokens is not None else _Alone(todo, device)
            reports, resumed = _blocks(todo, run, solver, progress)
            del solver
        _outside(todo, run)
        result = Result(
            out=out,
            plan=todo,
            layers=reports,
            tokens_sha256=None if tokens is None else _sha256(tokens),
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(device),
            resumed_blocks=resumed,
            dense=[name for name, method in todo.methods.items() if method is None],
        )
        _finish(result, run, progress)
    return result


class _Alone:
    """Weights are all that the methods need: no text, no activations, one layer in memory at a time."""

    def __init__(self, todo: Plan, device: torch.device) -> None:
        self.todo, self.device = todo, device

    def solve(self, block: int) -> Iterator[tuple[str, Tensor, Solution, LinearGroup | None]]:
        source = self.todo.source
        for layer in self.todo.layers:
            method = self.todo.methods[layer.name]
            if layer.block != block or method is None:
                continue
            weight = source.read([f"{layer.name}.weight"])[f"{layer.name}.weight"].to(self.device)
            weight = (weight.T if source.family.conv1d else weight).float().contiguous()
            solutions = method.quantize(LinearGroup({layer.name: weight}))
            yield layer.name, weight, solutions[layer.name], None

    def replay(self, block: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Nothing depends on earlier blocks."""


class _Streamed:
    """Calibration text runs through the model: as it was, where a method compares, and as it becomes.

    Only the model itself and the moments may use `fast` matrix products; what solvers compute from them may not.
    """

    def __init__(self, todo: Plan, tokens: Tensor, device: torch.device, dtype: torch.dtype, fast: bool) -> None:
        self.todo, self.fast = todo, fast
        self.keep = torch.bfloat16 if fast else dtype
        self.stream = ModelStream(todo.source, device=device, dtype=dtype)
        batch = max(1, BATCH_TOKENS // tokens.shape[1])
        self.quantized = [self.stream.embed(part) for part in torch.split(tokens, batch)]
        needs = frozenset[str]().union(*(method.needs for method in todo.methods.values() if method is not None))
        self.original = list(self.quantized) if needs & {CROSS, RESIDUAL_CROSS} else None

    def solve(self, block: int) -> Iterator[tuple[str, Tensor, Solution, LinearGroup | None]]:
        quantized, original = self._stage(block)
        for index, members in enumerate(self._groups(block)):
            methods = {layer.name: method for layer in members if (method := self.todo.methods[layer.name]) is not None}
            needs = frozenset[str]().union(*(method.needs for method in methods.values()))
            with matmul_precision(fast=self.fast, device=self.stream.device):
                group = gather(index, quantized, original, needs)
            for method in dict.fromkeys(methods.values()):
                names = [name for name in methods if methods[name] == method]
                paths = {self._path(name): name for name in names}
                part = LinearGroup(
                    {path: group.weights[path] for path in paths},
                    group.hessian,
                    group.cross,
                    group.residual_cross,
                )
                for path, solution in method.quantize(part).items():
                    ModelStream.set_weight(quantized.linear(path), solution.weight.dense())
                    yield paths[path], part.weights[path], solution, part
        self._advance(quantized, original)

    def replay(self, block: int, weights: Mapping[str, QuantizedWeight]) -> None:
        """Take the streams through a finished block exactly as `solve` did."""
        quantized, original = self._stage(block)
        for index, members in enumerate(self._groups(block)):
            with matmul_precision(fast=self.fast, device=self.stream.device):
                gather(index, quantized, original, frozenset())
            for layer in members:
                if layer.name in weights:
                    dense = weights[layer.name].to(self.stream.device).dense()
                    ModelStream.set_weight(quantized.linear(self._path(layer.name)), dense)
        self._advance(quantized, original)

    def _stage(self, block: int) -> tuple[StagedBlock, StagedBlock | None]:
        module = self.stream.load_block(block)
        original = None
        if self.original is not None:
            twin = copy.deepcopy(module)
            original = StagedBlock(self.stream, block, twin, self.original, keep=self.keep, final=True)
        return StagedBlock(self.stream, block, module, self.quantized, keep=self.keep), original

    def _advance(self, quantized: StagedBlock, original: StagedBlock | None) -> None:
        with matmul_precision(fast=self.fast, device=self.stream.device):
            self.quantized = list(quantized.outputs())
            if original is not None:
                self.original = list(original.outputs())

    def _groups(self, block: int) -> list[list[Linear]]:
        groups: list[list[Linear]] = [[] for _ in self.stream.family.groups]
        for layer in self.todo.layers:
            if layer.block == block:
                groups[layer.group].append(layer)
        return groups

    def _path(self, layer: str) -> str:
        """Inside its block."""
        return layer.removeprefix(f"{self.stream.family.blocks}.").partition(".")[2]


def _blocks(
    todo: Plan, run: RunFolder, solver: _Alone | _Streamed, progress: Progress
) -> tuple[list[LayerReport], int]:
    """The loop: every block is solved and committed, or, if that has been done before, replayed."""
    count, resumed = len(todo.parts) - 1, 0
    reports: list[LayerReport] = []
    progress("quantize", 0, count)
    last = max((block for block in range(count) if run.done(_part(block)) is None), default=-1)
    for block in range(count):
        if (file := run.done(_part(block))) is not None:
            if block < last:
                solver.replay(block, _restored(todo, block, file))
            rows = [LayerReport(**row) for row in run.report(_part(block))]
            resumed += 1
        else:
            rows, tensors = [], dict[str, Tensor]()
            for name, weight, solution, group in solver.solve(block):
                method = todo.methods[name]
                assert method is not None
                rows.append(_report(name, method, weight, solution, group))
                tensors |= checkpoint.stored_tensors(name, solution.weight)
            dense = [name for name in todo.parts[block] if name not in tensors]
            tensors |= _dense(todo.source, dense)
            ordered = {name: tensors[name] for name in todo.parts[block]}
            run.commit(_part(block), ordered, [asdict(row) for row in rows])
        reports += rows
        worst = max((row.error for row in rows), default=0.0)
        progress("quantize", block + 1, count, f"worst layer error {worst:.2g}")
    return reports, resumed


def _report(name: str, method: Method, weight: Tensor, solution: Solution, group: LinearGroup | None) -> LayerReport:
    try:
        solution.weight.check()
    except QcliError as problem:
        raise type(problem)(f"{name}: {problem.message}", hint=problem.hint) from None
    target = weight if solution.target is None else solution.target
    difference = target - solution.weight.dense()
    if group is not None and group.hessian is not None:
        error = ((difference @ group.hessian) * difference).sum()
        size, measure = ((target @ group.hessian) * target).sum(), "output"
    else:
        error, size, measure = difference.square().sum(), target.square().sum(), "weight"
    return LayerReport(
        name=name,
        method=method.name,
        spec=method.format.spec(),
        bits_per_weight=method.format.bits_per_weight(solution.weight.shape),
        error=float(error / size) if float(size) else 0.0,
        measure=measure,
        fallbacks=solution.fallbacks,
    )


def _restored(todo: Plan, block: int, file: Path) -> dict[str, QuantizedWeight]:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return {
        layer.name: checkpoint.Packed(method.format, layer.shape).restore(layer.name, tensors)
        for layer in todo.layers
        if layer.block == block and (method := todo.methods[layer.name]) is not None
    }


def _outside(todo: Plan, run: RunFolder) -> None:
    if run.done(_OUTSIDE) is None:
        run.commit(_OUTSIDE, _dense(todo.source, list(todo.parts[-1])))


def _dense(source: Source, names: list[str]) -> dict[str, Tensor]:
    tensors = source.read(names)
    if source.dense_dtype is None:
        return tensors
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[source.dense_dtype]
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _tokens(todo: Plan, run: RunFolder, device: torch.device, progress: Progress) -> Tensor:
    from safetensors.torch import load_file

    if (file := run.done(_TOKENS)) is None:
        settings = todo.recipe.calibration
        tokens = calibration_tokens(
            settings.data,
            todo.source,
            samples=settings.samples,
            seq_len=settings.seq_len,
            seed=todo.recipe.seed,
            device=str(device),
            progress=progress,
        )
        run.commit(_TOKENS, {"tokens": tokens.ids})
        return tokens.ids
    return load_file(file)["tokens"]


def _modified(path: Path) -> float:
    """When the newest file of a model was written."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return max(file.stat().st_mtime for file in files)


def _data_sha256(data: str) -> str | None:
    """Of a local file; named sets, folders and `self` are known by their name."""
    return shards.sha256(Path(data)) if Path(data).is_file() else None


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _finish(result: Result, run: RunFolder, progress: Progress) -> None:
    """Assemble the checkpoint in the run's folder, manifest last, and publish it."""
    todo, folder = result.plan, run.result()
    progress("write", 0, 1)
    parts = [*(_part(block) for block in range(len(todo.parts) - 1)), _OUTSIDE]
    shards.join([read_header(run.file(part)) for part in parts], folder, SHARD_SIZE)
    formats = {name: None if method is None else method.format for name, method in todo.methods.items()}
    config = dict(todo.source.config)
    config["quantization_config"] = checkpoint.quantization_config(todo.layers, formats)
    shards.write_json(folder / "config.json", config)
    todo.source.copy_companions(folder)
    shards.write_bytes(folder / checkpoint.RECIPE, todo.recipe.to_yaml().encode())
    story = {
        "versions": versions(),
        "recipe": todo.recipe.to_dict(),
        "source": {"model": todo.recipe.model, "fingerprint": todo.source.fingerprint()},
        "calibration_tokens_sha256": result.tokens_sha256,
        "seed": todo.recipe.seed,
        "bits_per_weight": todo.bits_per_weight,
        "model_bits_per_weight": todo.model_bits_per_weight,
        "bytes": todo.bytes,
        "layers": [asdict(layer) for layer in result.layers],
        "dense": dict.fromkeys(result.dense, "recipe override")
        | dict.fromkeys(todo.parts[-1], "not a linear layer of a block"),
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
    }
    checkpoint.write_manifest(folder, story)
    run.publish()
    progress("write", 1, 1)


def versions() -> dict[str, str]:
    """Of what decides a run's bytes."""
    import transformers

    return {
        "qcli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _part(block: int) -> str:
    return f"{block:05d}"

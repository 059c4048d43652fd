"""One quantization run: its folder, its blocks, its checkpoint."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcli.core.weight import QuantizedWeight
from qcli.data.datasets import is_folder
from qcli.data.tokens import Tokens, calibration_tokens, content_key, require_training, text_identity, text_sha256
from qcli.models import manifest as checkpoint
from qcli.models.open import Source
from qcli.quantization.block_loop import Alone, LayerReport, Streamed
from qcli.quantization.plan import Plan, plan
from qcli.recipe.recipe import Recipe
from qcli.utils import shards
from qcli.utils.cache import Cache
from qcli.utils.device import has_fast_matmul, matmul_precision, resolve_device, resolve_dtype
from qcli.utils.dtypes import torch_dtype
from qcli.utils.files import require_space, write_bytes, write_json
from qcli.utils.memory import peak_memory
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import RunFolder
from qcli.utils.safetensors import read_header

_TOKENS, _OUTSIDE = "tokens", "outside"


@dataclass(frozen=True)
class Result:
    """A finished checkpoint.

    Attributes:
        training: held-out losses before and after, best step and steps, by block and what was trained.
        allocation: what was predicted and measured where bits were chosen automatically.
    """

    out: Path
    plan: Plan
    layers: list[LayerReport]
    training: dict[str, dict[str, Any]]
    tokens_sha256: str | None
    seconds: float
    peak_memory: dict[str, int]
    resumed_blocks: int = 0
    dense: list[str] = field(default_factory=list)
    allocation: dict[str, Any] | None = None

    @property
    def fallbacks(self) -> dict[str, list[str]]:
        """By layer, or by what was trained, where there were any."""
        layers = {layer.name: layer.fallbacks for layer in self.layers if layer.fallbacks}
        stopped = {what: outcome["stopped"] for what, outcome in self.training.items()}
        return layers | {what: [reason] for what, reason in stopped.items() if reason is not None}

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
            "training": self.training,
            "unscaled": self.plan.unscaled,
            "allocation": self.allocation,
            "layers": [asdict(layer) for layer in self.layers],
        }


def quantize_as_written(recipe: Recipe, out: str | Path, progress: Progress, cache: Cache) -> Result:
    """Quantize a model whose recipe leaves nothing open. See `qcli.quantization.quantize.quantize`."""
    started = time.monotonic()
    todo = plan(recipe)
    device, dtype = resolve_device(recipe.device), resolve_dtype(recipe.dtype)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    identity = identity_of(recipe, todo.source, device, reads=todo.streamed)
    with RunFolder(Path(out), identity, recipe.resume) as run:
        require_space(Path(out), 2 * todo.bytes - run.size())
        tokens = _tokens(todo, run, device, cache, progress) if todo.streamed else None
        with matmul_precision(fast=False), torch.no_grad():
            loop: Alone | Streamed = Alone(todo, device)
            if tokens is not None:
                loop = Streamed(todo, run, tokens, device, dtype, fast=fast, progress=progress)
            layers, training, resumed = _blocks(todo, run, loop, progress)
            del loop
        _outside(todo, run)
        result = Result(
            out=Path(out),
            plan=todo,
            layers=layers,
            training=training,
            tokens_sha256=None if tokens is None else _sha256(tokens),
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(device),
            resumed_blocks=resumed,
            dense=[name for name, method in todo.methods.items() if method is None],
        )
        _finish(result, out, run, progress)
    return result


def identity_of(recipe: Recipe, source: Source, device: torch.device, *, reads: bool = True) -> dict[str, Any]:
    """What decides the bytes of a run, as plain data.

    Args:
        reads: whether it reads the recipe's text.
    """
    return {
        "versions": checkpoint.versions(),
        "compute": {"device": device.type, "bf16": recipe.dtype == "auto" and has_fast_matmul(device)},
        "source": state_of(source),
        "data": text_sha256(recipe.calibration.data) if reads else None,
        "recipe": recipe.fingerprint_fields(),
    }


def _blocks(
    todo: Plan, run: RunFolder, loop: Alone | Streamed, progress: Progress
) -> tuple[list[LayerReport], dict[str, dict[str, Any]], int]:
    """Every block is solved and committed, or, if that has been done before, replayed."""
    count, resumed = len(todo.parts) - 1, 0
    layers: list[LayerReport] = []
    training: dict[str, dict[str, Any]] = {}
    progress("quantize", 0, count)
    last = max((block for block in range(count) if run.done(_part(block)) is None), default=-1)
    for block in range(count):
        if (file := run.done(_part(block))) is not None:
            if block < last:
                loop.replay(block, _restored(todo, block, file))
            resumed += 1
        else:
            solved = loop.solve(block)
            tensors: dict[str, Tensor] = {}
            for name, weight in solved.weights.items():
                tensors |= checkpoint.stored_tensors(name, weight)
            dense = [name for name in todo.parts[block] if name not in tensors]
            tensors |= _dense(todo.source, dense) | _changed(todo, block, solved.dense)
            ordered = {name: tensors[name] for name in todo.parts[block]}
            run.commit(_part(block), ordered, solved.report())
        report = run.report(_part(block))
        layers += (rows := [LayerReport(**row) for row in report["layers"]])
        training |= {f"block {block} {what}": outcome for what, outcome in report["training"].items()}
        worst = max((row.error for row in rows), default=0.0)
        progress("quantize", block + 1, count, f"worst layer error {worst:.2g}")
    return layers, training, resumed


def _restored(todo: Plan, block: int, file: Path) -> dict[str, QuantizedWeight]:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return {
        layer.name: checkpoint.Packed(format, layer.shape).restore(layer.name, tensors)
        for layer in todo.layers
        if layer.block == block and (format := todo.formats[layer.name]) is not None
    }


def _outside(todo: Plan, run: RunFolder) -> None:
    if run.done(_OUTSIDE) is None:
        run.commit(_OUTSIDE, _dense(todo.source, list(todo.parts[-1])))


def _dense(source: Source, names: list[str]) -> dict[str, Tensor]:
    tensors = source.read(names)
    if source.dense_dtype is None:
        return tensors
    dtype = torch_dtype(source.dense_dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _changed(todo: Plan, block: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that transforms have rewritten, as the source stored them."""
    return {
        name: tensor.to("cpu", todo.parts[block][name].torch_dtype).contiguous() for name, tensor in tensors.items()
    }


def _tokens(todo: Plan, run: RunFolder, device: torch.device, cache: Cache, progress: Progress) -> Tensor:
    from safetensors.torch import load_file

    if (file := run.done(_TOKENS)) is None:
        ids = shared_tokens(todo.recipe, todo.source, device, cache, progress)
        if todo.held_out:
            require_training(Tokens(ids, todo.recipe.calibration.data), todo.held_out)
        run.commit(_TOKENS, {"tokens": ids}, text_identity(todo.recipe.calibration.data))
        return ids
    return load_file(file)["tokens"]


def shared_tokens(
    recipe: Recipe,
    source: Source,
    device: torch.device,
    cache: Cache,
    progress: Progress = silent,
    judges: int = 0,
) -> Tensor:
    """The recipe's calibration tokens, int64 `[samples + judges, length]`; the cache keeps those made before.

    See `qcli.data.tokens.calibration_tokens`.
    """
    settings = recipe.calibration
    held_out = settings.held_out if recipe.trained else 0

    def make() -> dict[str, Tensor]:
        tokens = calibration_tokens(
            settings.data,
            source,
            samples=settings.samples,
            seq_len=settings.seq_len,
            seed=recipe.seed,
            held_out=held_out,
            judges=judges,
            device=str(device),
            progress=progress,
        )
        return {"ids": tokens.ids}

    if cache.folder is None or is_folder(settings.data):
        return make()["ids"]
    key = {
        "calibration": [settings.samples, settings.seq_len, recipe.seed, held_out, judges],
        "device": device.type,
        **content_key(settings.data, source),
        **checkpoint.versions(),
    }
    return cache.tensors(key, make)["ids"]


def state_of(source: Source) -> dict[str, Any]:
    """What changes when a model does, without reading its weights: headers, and when its newest file was written."""
    files = source.path.glob("*.safetensors") if source.path.is_dir() else [source.path]
    return {"headers": source.fingerprint(), "modified": max(file.stat().st_mtime for file in files)}


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _finish(result: Result, out: str | Path, run: RunFolder, progress: Progress) -> None:
    """Assemble the checkpoint in the run's folder, manifest last, and publish it."""
    todo, folder = result.plan, run.result()
    progress("write", 0, 1)
    parts = [*(_part(block) for block in range(len(todo.parts) - 1)), _OUTSIDE]
    shards.join([read_header(run.file(part)) for part in parts], folder, shards.SHARD_SIZE)
    config = dict(todo.source.config)
    config["quantization_config"] = checkpoint.quantization_config(todo.layers, todo.formats, todo.recipe.activations)
    write_json(folder / "config.json", config)
    todo.source.copy_companions(folder)
    write_bytes(folder / checkpoint.RECIPE, todo.recipe.to_yaml(out=out).encode())
    story = {
        "versions": checkpoint.versions(),
        "recipe": todo.recipe.to_dict(out),
        "source": {"model": todo.recipe.model, "fingerprint": todo.source.fingerprint()},
        "calibration_tokens_sha256": result.tokens_sha256,
        "calibration_text_identity": run.report(_TOKENS) if result.tokens_sha256 else None,
        "seed": todo.recipe.seed,
        "bits_per_weight": todo.bits_per_weight,
        "model_bits_per_weight": todo.model_bits_per_weight,
        "bytes": todo.bytes,
        "layers": [asdict(layer) for layer in result.layers],
        "training": result.training,
        "unscaled": todo.unscaled,
        "dense": dict.fromkeys(result.dense, "recipe override")
        | dict.fromkeys(todo.parts[-1], "not a linear layer of a block"),
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
    }
    checkpoint.write_manifest(folder, story)
    run.publish()
    progress("write", 1, 1)


def _part(block: int) -> str:
    return f"{block:05d}"

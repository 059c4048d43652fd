"""What a model's layers see: calibration tokens, statistics of every input, and how each layer takes rounding.

The folder holds `tokens.safetensors` (`ids`), `statistics.safetensors` (`<layer>.absmax`, `<layer>.second_moment`,
float32 `[in_features]`), with `hessians` one `hessians-00000.safetensors` a block (`<layer>.hessian`, float32
`[in_features, in_features]`, under the first layer of those that share an input), and `calibration.json`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qcli import __version__, shards
from qcli.compute import has_fast_matmul, matmul_precision, resolve_device, resolve_dtype
from qcli.data import Tokens, calibration_tokens
from qcli.errors import StateError
from qcli.method import LinearGroup
from qcli.methods.rtn import RTN
from qcli.models.source import open_source
from qcli.models.stream import ModelStream
from qcli.progress import Progress, silent

if TYPE_CHECKING:
    from qcli.recipe import Recipe

FORMAT_VERSION = 1
_BATCH_TOKENS = 4096  # in flight in one block
_BITS = (2, 3, 4)
_GROUP_SIZE = 64


@dataclass(frozen=True)
class LayerStatistics:
    """What is known of one layer.

    Attributes:
        absmax: largest magnitude among its inputs.
        dead_channels: inputs that are 0 for every token.
        sensitivity: by bits, the relative squared error of its output after rounding to nearest in groups of
            64, for inputs with the measured second moments and no correlation.
    """

    absmax: float
    dead_channels: int
    sensitivity: dict[int, float]


@dataclass(frozen=True)
class Calibration:
    """A finished calibration folder; `layers` by name, in order of computation."""

    out: Path
    settings: dict[str, Any]
    layers: dict[str, LayerStatistics]

    def to_json(self) -> dict[str, Any]:
        """The content of `calibration.json`, and where it is."""
        return {"out": str(self.out), **self.record()}

    def record(self) -> dict[str, Any]:
        """The content of `calibration.json`."""
        return {**self.settings, "layers": {name: asdict(layer) for name, layer in self.layers.items()}}


def calibrate(
    recipe: Recipe, out: Path, progress: Progress = silent, *, hessians: bool = False
) -> Calibration:
    """Run calibration text through a model, block by block, and write down what its layers see.

    Args:
        recipe: its model, seed, device, dtype and calibration.
        out: a folder that appears complete or not at all.
        hessians: also write `E[x^T x]` of every input: exact, and as large as the inputs are wide, squared.

    Raises:
        UsageError: no such model or data, or too little text.
        StateError: `out` exists.
        ResourceError: no space.
    """
    if out.exists():
        raise StateError(f"{out} exists", hint="choose another --out, or remove it")
    device, dtype = resolve_device(recipe.device), resolve_dtype(recipe.dtype)
    source = open_source(recipe.model)
    linears = source.linears()
    wanted = recipe.calibration
    tokens = calibration_tokens(
        wanted.data,
        source,
        samples=wanted.samples,
        seq_len=wanted.seq_len,
        seed=recipe.seed,
        device=device,
        progress=progress,
    )
    settings = {
        "format_version": FORMAT_VERSION,
        "qcli": __version__,
        "model": recipe.model,
        "source_fingerprint": source.fingerprint(),
        "data": tokens.source,
        "samples": tokens.ids.shape[0],
        "seq_len": tokens.ids.shape[1],
        "seed": recipe.seed,
        "tokens_sha256": tokens.sha256,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "hessians": hessians,
    }
    with _folder(out) as partial:
        shards.write_tensors(partial / "tokens.safetensors", {"ids": tokens.ids})
        statistics: dict[str, Tensor] = {}
        layers: dict[str, LayerStatistics] = {}
        fast = recipe.dtype == "auto" and has_fast_matmul(device)
        with matmul_precision(fast=fast), torch.inference_mode():
            stream = ModelStream(source, device=device, dtype=dtype)
            for index, block, inputs in _blocks(stream, tokens, hessians, progress):
                for linear in (linear for linear in linears if linear.block == index):
                    seen = inputs[linear.group]
                    path = linear.name.removeprefix(f"{stream.family.blocks}.{index}.")
                    weight = ModelStream.weight_of(block.get_submodule(path)).float()
                    layers[linear.name] = _layer_statistics(weight, seen)
                    statistics[f"{linear.name}.absmax"] = seen.absmax
                    statistics[f"{linear.name}.second_moment"] = seen.second_moment
                if hessians:
                    first = {linear.group: linear.name for linear in reversed(linears) if linear.block == index}
                    shards.write_tensors(
                        partial / f"hessians-{index:05d}.safetensors",
                        {f"{name}.hessian": inputs[group].hessian for group, name in sorted(first.items())},
                    )
        shards.write_tensors(partial / "statistics.safetensors", statistics)
        result = Calibration(out, settings, layers)
        shards.write_json(partial / "calibration.json", result.record())
    return result


class _Inputs:
    """Running statistics of the inputs that some linears share."""

    def __init__(self, width: int, device: torch.device, hessian: bool) -> None:
        self.tokens = 0
        self.absmax = torch.zeros(width, device=device)
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, device=device) if hessian else None

    def add(self, inputs: Tensor) -> None:
        """Take in `[..., width]`."""
        rows = inputs.flatten(0, -2).float()
        self.tokens += len(rows)
        self.absmax = torch.maximum(self.absmax, rows.abs().amax(0))
        self._squares += rows.square().sum(0)
        if self._products is not None:
            with matmul_precision(fast=False):
                self._products.addmm_(rows.T, rows)

    @property
    def second_moment(self) -> Tensor:
        """Mean square of each channel, float32 `[width]`."""
        return (self._squares / self.tokens).float()

    @property
    def hessian(self) -> Tensor:
        """`E[x^T x]`, float32 `[width, width]`, symmetric to the bit."""
        assert self._products is not None
        return (self._products + self._products.T) / (2 * self.tokens)


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name at the end; nothing stays of it after an error."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    except OSError as error:
        raise shards.disk_problem(partial, error) from None
    try:
        yield partial
        shards.publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _blocks(
    stream: ModelStream, tokens: Tokens, hessians: bool, progress: Progress
) -> Iterator[tuple[int, nn.Module, list[_Inputs]]]:
    """Each block, and the statistics of each of its groups of linears, over all tokens."""
    progress("calibrate", 0, stream.n_blocks)
    batches = tokens.ids.split(max(1, _BATCH_TOKENS // tokens.ids.shape[1]))
    hidden = [stream.embed(batch) for batch in batches]
    for index in range(stream.n_blocks):
        block = stream.load_block(index)
        readers = [block.get_submodule(group.linears[0]) for group in stream.family.groups]
        inputs = [
            _Inputs(ModelStream.weight_of(reader).shape[1], stream.device, hessians) for reader in readers
        ]
        for reader, seen in zip(readers, inputs, strict=True):
            reader.register_forward_pre_hook(lambda _, args, seen=seen: seen.add(args[0]))
        hidden = [stream.run_block(block, index, states) for states in hidden]
        yield index, block, inputs
        progress("calibrate", index + 1, stream.n_blocks)


def _layer_statistics(weight: Tensor, seen: _Inputs) -> LayerStatistics:
    moment = seen.second_moment
    output = (weight.square() @ moment).sum()
    sensitivity = {}
    for bits in _BITS:
        method = RTN(bits=bits, group_size=_GROUP_SIZE, group_tail="ragged")
        rounded = method.quantize(LinearGroup({"": weight}))[""].weight.dense()
        error = ((weight - rounded).square() @ moment).sum()
        sensitivity[bits] = float(error / output) if output > 0 else 0.0
    return LayerStatistics(float(seen.absmax.max()), int((seen.absmax == 0).sum()), sensitivity)

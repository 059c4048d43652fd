"""Calibration without quantization: tokens, statistics of every layer's inputs, and sensitivity to rounding.

The folder holds `tokens.safetensors` (`ids`), `statistics.safetensors` (`<layer>.absmax`, `<layer>.second_moment`,
float32 `[in_features]`), with `hessians` one `hessians-00000.safetensors` a block (`<layer>.hessian`, float32
`[in_features, in_features]`, under the first layer of those that share an input), and `calibration.json`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcli import __version__
from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.methods.rtn import RTN
from qcli.data.calibration_folder import require_own_folder, write_record
from qcli.data.identity import text_identity
from qcli.data.source import text_paths
from qcli.data.stored_windows import TOKENS
from qcli.data.tokens import TokenRequest, calibration_tokens
from qcli.models.families import Linear
from qcli.models.open import open_source
from qcli.models.stream import ModelStream, batches
from qcli.quantization.footprint import calibration_demand
from qcli.utils import shards
from qcli.utils.determinism import deterministic
from qcli.utils.device import has_fast_matmul, matmul_precision, resolve_device, resolve_dtype
from qcli.utils.paths import portable_name
from qcli.utils.placement import limit_memory, place
from qcli.utils.progress import Progress, silent
from qcli.utils.run_folder import Replacing, RunFolder, refuse_existing
from qcli.utils.stored_batches import BatchMemory, StoredBatches
from qcli.utils.trust import NOTHING, Trust

if TYPE_CHECKING:
    from qcli.recipe.recipe import Recipe

FORMAT_VERSION = 1
_BITS = (2, 3, 4)
_GROUP_SIZE = 64


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer.

    Attributes:
        absmax: largest magnitude among its inputs.
        dead_channels: number of inputs that are 0 for every token.
        sensitivity: by bits, the relative squared error of the output after rounding to nearest in groups of 64, for
            uncorrelated inputs with the measured second moments.
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
        """The content of `calibration.json`, and the folder."""
        return {"out": str(self.out), **self.record()}

    def record(self) -> dict[str, Any]:
        """The content of `calibration.json`, with names and hashes for paths: the same on every machine."""
        names = {name: portable_name(self.settings[name]) for name in ("model", "data")}
        return {**self.settings, **names, "layers": {name: asdict(layer) for name, layer in self.layers.items()}}


def calibrate(
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    *,
    hessians: bool = False,
    trust: Trust = NOTHING,
    force: bool = False,
) -> Calibration:
    """Run calibration text through a model, block by block, and write the statistics of its layers' inputs.

    Args:
        recipe: its model, seed, device, dtype, bos and calibration.
        out: a folder that appears complete or not at all.
        hessians: also write `E[x^T x]` of every input: exact, `in_features` squared numbers each.
        force: replace such a folder that is at `out`, once the new one is complete.

    Raises:
        UsageError: no such model or data, or too little text.
        StateError: `out` exists, or is being written by something else.
        ResourceError: no space, or too little memory.
        UnsupportedError: as `quantize`.
    """
    replacing = Replacing(require_own_folder, force, (recipe.model, *text_paths(recipe.calibration.data)))
    refuse_existing(out, replacing)
    with deterministic(resolve_device(recipe.device), wanted=recipe.deterministic):
        return _calibrate(recipe, out, progress, hessians, trust, replacing)


def _calibrate(
    recipe: Recipe, out: Path, progress: Progress, hessians: bool, trust: Trust, replacing: Replacing
) -> Calibration:
    device, dtype = resolve_device(recipe.device), resolve_dtype(recipe.dtype)
    progress("reading the model", 0, 0)
    source = open_source(recipe.source, trust)
    linears = source.linears()
    text = recipe.calibration
    request = TokenRequest(text.data, text.samples, text.seq_len, recipe.seed, text.held_out, bos=recipe.bos)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    demand = calibration_demand(source, text, dtype.itemsize, fast=fast, hessians=hessians)
    placement = place(demand, device, recipe.max_memory, "calibrating with this model")
    placement.require("fewer --samples or a shorter --seq-len take less; --device cpu, or another --max-memory")
    limit_memory(device, recipe.max_memory)
    tokens = calibration_tokens(request, source, device=device, progress=progress)
    settings = {
        "format_version": FORMAT_VERSION,
        "qcli": __version__,
        "model": recipe.model,
        "source_fingerprint": source.fingerprint(),
        "data": tokens.name,
        "samples": tokens.ids.shape[0],
        "seq_len": tokens.ids.shape[1],
        "seed": recipe.seed,
        "bos": tokens.bos,
        "tokens_sha256": tokens.sha256,
        "text_identity": text_identity(tokens.data, calibration=True),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "hessians": hessians,
    }
    with RunFolder(out, settings, recipe.resume, replacing) as run:
        folder = run.result()
        shards.write_tensors(folder / TOKENS, {"ids": tokens.ids})
        statistics: dict[str, Tensor] = {}
        layers: dict[str, LayerStatistics] = {}
        with matmul_precision(fast=fast), torch.inference_mode():
            stream = ModelStream(source, device=device, dtype=dtype)
            hidden = BatchMemory(device, on_host=placement.on_host).store(map(stream.embed, batches(tokens.ids)))
            progress("calibrate", 0, stream.n_blocks, f"memory: {placement.in_words()}")
            for index in range(stream.n_blocks):
                members = [linear for linear in linears if linear.block == index]
                inputs = _run_block(stream, index, hidden, members, layers, hessians)
                for linear in members:
                    statistics[f"{linear.name}.absmax"] = inputs[linear.path].absmax
                    statistics[f"{linear.name}.second_moment"] = inputs[linear.path].second_moment
                if hessians:
                    first = {inputs[linear.path]: linear.name for linear in reversed(members)}
                    shards.write_tensors(
                        folder / f"hessians-{index:05d}.safetensors",
                        {f"{name}.hessian": shared.hessian for shared, name in reversed(first.items())},
                    )
                progress("calibrate", index + 1, stream.n_blocks)
        shards.write_tensors(folder / "statistics.safetensors", statistics)
        result = Calibration(out, settings, layers)
        write_record(folder, result.record())
        run.publish()
    return result


class _Inputs:
    """Running statistics of the input that linears share; perhaps of no tokens, where they are an expert's."""

    def __init__(self, width: int, device: torch.device, hessian: bool) -> None:
        self.tokens = 0
        self.absmax = torch.zeros(width, device=device)
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._products = torch.zeros(width, width, device=device) if hessian else None

    def add(self, inputs: Tensor) -> None:
        """Add inputs `[..., width]`."""
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
        return (self._squares / max(1, self.tokens)).float()

    @property
    def hessian(self) -> Tensor:
        """`E[x^T x]`, float32 `[width, width]`, symmetric to the bit."""
        assert self._products is not None
        return (self._products + self._products.T) / (2 * max(1, self.tokens))


def _run_block(
    stream: ModelStream,
    index: int,
    hidden: StoredBatches[Tensor],
    members: list[Linear],
    layers: dict[str, LayerStatistics],
    hessians: bool,
) -> dict[str, _Inputs]:
    """Run all hidden states through one block, in place, and add its `members` to `layers`.

    Returns:
        Statistics of inputs by path of the linear; linears that read one input share theirs.
    """
    block = stream.load_block(index)
    inputs: dict[str, _Inputs] = {}
    for group in stream.family.groups_of(index):
        for paths in group.sets:
            reader = block.get_submodule(paths[0])
            group_inputs = _Inputs(ModelStream.weight_of(reader).shape[1], stream.device, hessians)
            reader.register_forward_pre_hook(lambda _, args, inputs=group_inputs: inputs.add(args[0]))
            inputs |= dict.fromkeys(paths, group_inputs)
    stream.advance(block, index, hidden)
    for linear in members:
        path = linear.path
        weight = ModelStream.weight_of(block.get_submodule(path)).float()
        layers[linear.name] = _layer_statistics(weight, inputs[path])
    return inputs


def _layer_statistics(weight: Tensor, inputs: _Inputs) -> LayerStatistics:
    second_moment = inputs.second_moment
    output = (weight.square() @ second_moment).sum()
    sensitivity = {}
    for bits in _BITS:
        method = RTN(bits=bits, group_size=_GROUP_SIZE, group_tail="ragged")
        rounded = method.quantize(LinearGroup({"": weight}))[""].weight.dense()
        error = ((weight - rounded).square() @ second_moment).sum()
        sensitivity[bits] = float(error / output) if output > 0 else 0.0
    return LayerStatistics(float(inputs.absmax.max()), int((inputs.absmax == 0).sum()), sensitivity)

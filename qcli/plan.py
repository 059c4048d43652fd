"""What quantizing will do, from headers alone: layers, bits, bytes on disk, memory. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from qcli import shards
from qcli.errors import UnsupportedError
from qcli.format import StoredTensor
from qcli.method import Method
from qcli.models.arch import Linear
from qcli.models.base import Source
from qcli.models.native import NativeSource
from qcli.models.source import open_source
from qcli.recipe import Recipe

SHARD_SIZE = 5 * 10**9
TENSOR_PARALLEL = (2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """What will be written, part by part.

    Attributes:
        layers: all quantizable layers, in order.
        methods: by layer name; None: stays dense.
        parts: stored tensors by name, of each block and then of everything outside the blocks.
        streamed: whether calibration text runs through the model.
    """

    source: Source
    recipe: Recipe
    layers: list[Linear]
    methods: dict[str, Method | None]
    parts: list[dict[str, StoredTensor]]
    streamed: bool

    @property
    def bytes(self) -> int:
        """Size of the safetensors files, to the byte."""
        return shards.shard_bytes(self.parts, SHARD_SIZE)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized layers, tables included, per weight."""
        chosen = [(layer.shape, method) for layer in self.layers if (method := self.methods[layer.name]) is not None]
        bits = sum(method.format.bits_per_weight(shape) * prod(shape) for shape, method in chosen)
        return bits / sum(prod(shape) for shape, _ in chosen)

    @property
    def model_bits_per_weight(self) -> float:
        """Stored bits of all tensors per weight of the model."""
        bits = 8 * sum(tensor.bytes for part in self.parts for tensor in part.values())
        return bits / sum(prod(tensor.shape) for tensor in self.source.tensors().values())

    @property
    def peak_memory(self) -> int:
        """Estimated bytes at the peak: one block in float32 (two with both streams), activations, moments."""
        blocks: dict[int, int] = {}
        for layer in self.layers:
            blocks[layer.block] = blocks.get(layer.block, 0) + 4 * prod(layer.shape)
        block = max(blocks.values())
        widest = max(layer.shape[1] for layer in self.layers)
        outside = sum(tensor.bytes for tensor in self.parts[-1].values())
        if not self.streamed:
            largest = max(prod(layer.shape) for layer in self.layers)
            return _RUNTIME + outside + 4 * 6 * largest
        hidden = self.layers[0].shape[1]
        tokens = self.recipe.calibration.samples * self.recipe.calibration.seq_len
        activations = tokens * (2 * 4 * hidden + 2 * 2 * hidden + 2 * widest)
        return _RUNTIME + 2 * outside + 3 * block + activations + 8 * 6 * widest**2

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "model": self.recipe.model,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "bytes": self.bytes,
            "source_bytes": self.source.bytes(),
            "peak_memory_estimate": self.peak_memory,
            "calibrated": self.streamed,
            "layers": [self._row(layer) for layer in self.layers],
            "outside": sorted(self.parts[-1]),
        }

    def _row(self, layer: Linear) -> dict[str, Any]:
        method = self.methods[layer.name]
        row: dict[str, Any] = {"name": layer.name, "shape": list(layer.shape)}
        if method is None:
            return row | {"method": None, "format": None, "why_dense": "recipe override"}
        format = method.format
        return row | {
            "method": method.name,
            **format.spec(),
            "bits_per_weight": format.bits_per_weight(layer.shape),
            "divides_tensor_parallel": [n for n in TENSOR_PARALLEL if _divides(layer, method, n)],
        }


_RUNTIME = 450 * 10**6  # torch and transformers themselves


def plan(recipe: Recipe) -> Plan:
    """Check a recipe against its model and say what quantizing will do; nothing is read but headers.

    Raises:
        UsageError: the model cannot be used, overrides match nothing, groups do not divide; all problems at once.
    """
    source = open_source(recipe.model)
    if isinstance(source, NativeSource):
        raise UnsupportedError(f"{recipe.model} is already quantized by qcli", hint="start from the unquantized model")
    layers = source.linears()
    methods = recipe.assign(layers)
    parts: list[dict[str, StoredTensor]] = [{} for _ in range(1 + max(layer.block for layer in layers))]
    quantized: set[str] = set()
    for layer in layers:
        method = methods[layer.name]
        if method is not None:
            quantized.add(f"{layer.name}.weight")
            for suffix, stored in method.format.stored(layer.shape).items():
                parts[layer.block][f"{layer.name}.{suffix}"] = stored
    outside: dict[str, StoredTensor] = {}
    prefix = f"{source.family.blocks}."
    for name, tensor in source.tensors().items():
        if name in quantized:
            continue
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        home = parts[int(block)] if block.isdigit() else outside
        home[name] = StoredTensor(source.dense_dtype or tensor.dtype, tensor.shape)
    streamed = any(method is not None and method.needs for method in methods.values())
    return Plan(source, recipe, layers, methods, [*parts, outside], streamed)


def _divides(layer: Linear, method: Method, ranks: int) -> bool:
    """Whether rows and, group by group, columns can be split over `ranks` devices."""
    rows, columns = layer.shape
    if rows % ranks or columns % ranks:
        return False
    return method.misfit((rows, columns // ranks)) is None

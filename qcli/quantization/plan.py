"""The plan of a quantization, from headers alone: layers, bits, bytes on disk, peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.algorithms.layer_group import CROSS, OUTPUT_GAP
from qcli.algorithms.method import Method
from qcli.core.weight import Format
from qcli.data.datasets import require_text
from qcli.data.image_rows import has_images
from qcli.data.source import Data, label
from qcli.models.contents import contents, stored_contents
from qcli.models.families import Linear, has_row
from qcli.models.loadable import require_loadable
from qcli.models.native import GUARD, guard_name, with_guard
from qcli.models.open import open_source
from qcli.models.quantized import LayerStorage, QuantizedSource
from qcli.models.source import ModelSource
from qcli.models.vocabulary import Vocabulary
from qcli.quantization.search_space import search_space, uniform_recipe
from qcli.quantization.solve import stored_format
from qcli.recipe.assign import assign, vocabulary_methods
from qcli.recipe.recipe import Recipe
from qcli.recipe.vocabulary import VocabularyLayer
from qcli.utils import shards
from qcli.utils.dtypes import HALF_DTYPES, StoredTensor
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.text import with_wildcards
from qcli.utils.trust import NOTHING, Trust

if TYPE_CHECKING:
    import torch

_USE_TEXT = "use text, or a copy of the file without the images"
TENSOR_PARALLEL = (2, 4, 8)
_MANY = 1 / 3  # of the bytes: so much of them is worth a remark
VOCABULARY_SLICE = 1 << 25  # weights of embedding or head that are quantized at a time


@dataclass(frozen=True)
class Plan:
    """A recipe applied to its model.

    Attributes:
        layers: every quantizable layer, in order of computation.
        methods: by layer name; None: the layer stays dense.
        formats: by layer name, low-rank factors included; None: the layer stays dense.
        parts: stored tensors by name: one part for each block, then one for everything outside the blocks.
        vocabulary: methods of embedding and head by module name, as far as they are quantized.
        modules: where embedding and head are.
        choices: what `bits: auto` chooses from, as `SearchSpace.choices`; None: the recipe leaves nothing open.
    """

    source: ModelSource
    recipe: Recipe
    layers: list[Linear]
    methods: dict[str, Method | None]
    formats: dict[str, Format | None]
    parts: list[dict[str, StoredTensor]]
    vocabulary: dict[str, Method]
    modules: Vocabulary
    choices: dict[str, Any] | None = None

    @property
    def held_out(self) -> int:
        """Number of calibration samples, the last ones, that nothing is fitted to."""
        return self.recipe.calibration.held_out if self.recipe.trained else 0

    @cached_property
    def needs(self) -> frozenset[str]:
        """Input statistics that any layer needs."""
        methods = dict.fromkeys(method for method in self.methods.values() if method is not None)
        return frozenset[str]().union(*map(self.needs_of, methods))

    def needs_of(self, method: Method) -> frozenset[str]:
        """Input statistics that a layer of this method needs, low-rank compensation and refinement included."""
        later_steps = (self.recipe.low_rank, self.recipe.refinement)
        return method.needs.union(*(step.needs for step in later_steps if step is not None))

    @property
    def calibrated(self) -> bool:
        """Whether calibration text has to run through the model."""
        return self.recipe.trained or bool(self.needs) or self.reads_final_norm

    @property
    def reads_final_norm(self) -> bool:
        """Whether the head is fitted to its inputs."""
        return any(method.needs for method in self.vocabulary.values())

    @cached_property
    def vocabulary_storage(self) -> dict[str, LayerStorage]:
        """How embedding and head are stored, by module name, as far as they are quantized."""
        shapes = self.source.tensors()
        return {
            name: LayerStorage(method.format, (rows, columns))
            for name, method in self.vocabulary.items()
            for rows, columns in [shapes[f"{name}.weight"].shape]
        }

    @cached_property
    def compares(self) -> bool:
        """Whether activations of the full-precision model move along."""
        return self.recipe.trained or bool(self.needs & {CROSS, OUTPUT_GAP})

    @property
    def reconstructs(self) -> bool:
        """Whether outputs of blocks are reconstructed."""
        return self.recipe.refinement is not None and self.recipe.refinement.scope == "block"

    @property
    def source_dtype(self) -> str:
        """What the weights are stored in (safetensors' name)."""
        return self.source.tensors()[f"{self.layers[0].name}.weight"].dtype

    @cached_property
    def bytes(self) -> int:
        """Size of the safetensors files, to the byte."""
        parts = with_guard(self.parts, guard_name(self.formats), GUARD)
        on_disk = [
            {
                stored: own
                for name, tensor in part.items()
                for stored, own in self.source.as_on_disk(name, tensor, tensor.rows).items()
            }
            for part in parts
        ]
        return shards.shard_bytes(on_disk, shards.SHARD_SIZE)

    @cached_property
    def contents(self) -> dict[str, int]:
        """Bytes by kind, see `qcli.models.contents`."""
        sizes = {name: tensor.bytes for part in self.parts for name, tensor in part.items()}
        return contents(sizes, self.bytes, [layer.name for layer in self.layers], self.modules)

    @cached_property
    def smaller(self) -> dict[str, Any] | None:
        """The settings that quantize embedding and head, if these are dense and large, and the model's bytes then."""
        sections = {self.modules.embedding: "embeddings"}
        if self.modules.head is not None and not self.modules.tied:
            sections[self.modules.head] = "lm_head"
        settings, saved, dense = [], 0, 0
        for name, section in sections.items():
            if (stored := self.parts[-1].get(f"{name}.weight")) is None or len(stored.shape) != 2:
                continue
            rows, columns = stored.shape
            method = VocabularyLayer().as_method()
            if method.unsupported_reason((rows, columns)) is not None:
                continue
            packed = sum(tensor.bytes for tensor in LayerStorage(method.format, (rows, columns)).stored(name).values())
            if packed < stored.bytes:
                settings.append(f"{section}.bits={VocabularyLayer().bits}")
                saved, dense = saved + stored.bytes - packed, dense + stored.bytes
        many = dense >= _MANY * self.bytes
        return {"set": settings, "bytes": self.bytes - saved} if settings and many else None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the quantized layers, tables included."""
        chosen = [(layer.shape, format) for layer in self.layers if (format := self.formats[layer.name]) is not None]
        bits = sum(format.bits_per_weight(shape) * prod(shape) for shape, format in chosen)
        return bits / sum(prod(shape) for shape, _ in chosen)

    @property
    def model_bits_per_weight(self) -> float:
        """Stored bits per weight of the whole model."""
        bits = 8 * sum(tensor.bytes for part in self.parts for tensor in part.values())
        return bits / sum(prod(tensor.shape) for tensor in self.source.tensors().values())

    @cached_property
    def kept(self) -> list[str]:
        """Matrices inside the blocks that are no quantizable layers, such as routers and convolutions; by pattern."""
        prefix, known = f"{self.source.family.blocks}.", {f"{layer.name}.weight" for layer in self.layers}
        stored = self.source.tensors().items()
        names = [name for name, tensor in stored if name.startswith(prefix) and len(tensor.shape) > 1]
        return [*dict.fromkeys(with_wildcards(name) for name in names if name not in known)]

    @property
    def unscaled(self) -> list[str]:
        """Paths in a block of quantized layers whose inputs no transform can scale; experts by pattern."""
        if not self.recipe.all_transforms:
            return []
        names, found = self.source.tensors(), dict[str, None]()
        for block in range(self.source.n_blocks) if self.source.family.discovered else (0,):
            prefix, chosen = self.prefix(block), self.methods_of(block)

            def has_weight(path: str, prefix: str = prefix) -> bool:
                return f"{prefix}{path}.weight" in names

            paths = self.source.family.unscaled(block, has_weight)
            found |= {with_wildcards(path): None for path in paths if path in chosen}
        return [*found]

    @cached_property
    def sees_images(self) -> bool:
        """Whether calibration samples have images; texts that are more than a file are read as text alone."""
        data = self.recipe.calibration.data
        return self.calibrated and isinstance(data, str) and has_images(data)

    @cached_property
    def last_block(self) -> int:
        """The last block that activations have to reach: it has a layer to quantize, or the head is to be fitted."""
        if self.reads_final_norm:
            return len(self.parts) - 2
        return max(layer.block for layer in self.layers if self.methods[layer.name] is not None)

    def prefix(self, block: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.source.family.blocks}.{block}."

    def methods_of(self, block: int) -> dict[str, Method]:
        """The methods of a block's quantized layers, by path in the block."""
        return {
            layer.path: method
            for layer in self.layers
            if layer.block == block and (method := self.methods[layer.name]) is not None
        }

    def stored_dtypes(self, block: int) -> dict[str, torch.dtype]:
        """Half-precision dtypes of a block's tensors that stay dense, by name in the block."""
        prefix = self.prefix(block)
        return {
            name.removeprefix(prefix): tensor.torch_dtype
            for name, tensor in self.parts[block].items()
            if tensor.dtype in HALF_DTYPES
        }

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; `footprint.quantization_placement` knows the memory."""
        return {
            "model": self.recipe.model,
            "bits_per_weight": self.bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "bytes": self.bytes,
            "source_bytes": self.source.bytes(),
            "contents": self.contents,
            "source_contents": stored_contents(self.source, self.modules),
            "smaller": self.smaller,
            "choices": self.choices,
            "source_quantized_as": self.source.quantized_as,
            "calibrated": self.calibrated,
            "unscaled": self.unscaled,
            "kept": self.kept,
            "layers": [self._row(layer) for layer in self.layers],
            "vocabulary": [self._vocabulary_row(name) for name in self.vocabulary],
            "left_out": self.source.left_out,
            "outside": sorted(self.dense_outside),
            "dense_parts": list(self.source.family.dense_parts),
        }

    @property
    def dense_outside(self) -> list[str]:
        """Tensors outside the blocks that stay as they are."""
        packed = {name for layer, storage in self.vocabulary_storage.items() for name in storage.stored(layer)}
        return [name for name in self.parts[-1] if name not in packed]

    def _vocabulary_row(self, name: str) -> dict[str, Any]:
        format, shape = self.vocabulary_storage[name].format, self.vocabulary_storage[name].shape
        return {
            "name": name,
            "shape": list(shape),
            "method": self.vocabulary[name].name,
            **format.spec(),
            "bits_per_weight": format.bits_per_weight(shape),
        }

    def _row(self, layer: Linear) -> dict[str, Any]:
        method = self.methods[layer.name]
        row: dict[str, Any] = {"name": layer.name, "shape": list(layer.shape)}
        format = self.formats[layer.name]
        if method is None or format is None:
            return row | {"method": None, "format": None, "why_dense": "recipe override"}
        return row | {
            "method": method.name,
            **format.spec(),
            "bits_per_weight": format.bits_per_weight(layer.shape),
            "divides_tensor_parallel": [n for n in TENSOR_PARALLEL if _divides(layer, method, n)],
        }


def make_plan(recipe: Recipe, trust: Trust = NOTHING) -> Plan:
    """Check a recipe against its model and plan the quantization; only headers are read.

    With `bits: auto` the plan is that of the largest uniform width within the target.

    Raises:
        UsageError: the model is not supported, its config and weights do not belong together, overrides match nothing,
            groups do not divide rows (every problem is listed), or there is no such calibration text.
        UnsupportedError: the model is already quantized by qcli.
    """
    source = open_source(recipe.source, trust)
    if isinstance(source, QuantizedSource):
        raise UnsupportedError(f"{recipe.model} is already quantized by qcli", hint="start from the unquantized model")
    source.companions()  # what cannot be copied is refused before any work
    layers = source.linears()
    recipe, assigned, choices = _assigned(recipe, layers)
    model = require_loadable(source)
    if recipe.all_transforms:
        _require_folds(recipe.all_transforms[0].name, source)
    for option in ("all_experts", "expert_tokens"):
        if getattr(recipe.calibration, option) and not _has_experts(source, layers):
            raise UsageError(f"calibration.{option}: {recipe.model} has no experts")
    stored_weights = source.tensors()
    methods = {
        name: method and method.for_weights_of(stored_weights[f"{name}.weight"].dtype)
        for name, method in assigned.items()
    }
    parts: list[dict[str, StoredTensor]] = [{} for _ in range(source.n_blocks)]
    quantized: set[str] = set()
    formats = {
        name: None if method is None else stored_format(method, recipe.low_rank) for name, method in methods.items()
    }
    for layer in layers:
        format = formats[layer.name]
        if format is not None:
            quantized.add(f"{layer.name}.weight")
            for suffix, stored in format.stored(layer.shape).items():
                parts[layer.block][f"{layer.name}.{suffix}"] = stored
    modules = Vocabulary.of(model, stored_weights)
    vocabulary = vocabulary_methods(recipe, modules, stored_weights)
    outside: dict[str, StoredTensor] = {}
    for name, method in vocabulary.items():
        rows, columns = stored_weights[f"{name}.weight"].shape
        quantized.add(f"{name}.weight")
        outside |= LayerStorage(method.format, (rows, columns)).stored(name)
    prefix = f"{source.family.blocks}."
    for name, tensor in stored_weights.items():
        if name in quantized:
            continue
        block = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        home = parts[int(block)] if block.isdigit() else outside
        home[name] = StoredTensor(source.dense_dtype or tensor.dtype, tensor.shape)
    if source.family.discovered:
        _require_names(source, [*parts, outside], formats)
    plan = Plan(source, recipe, layers, methods, formats, [*parts, outside], vocabulary, modules, choices)
    if plan.calibrated:
        require_text(recipe.calibration.data)
        if plan.sees_images:
            _require_sight(plan, choosing_bits=choices is not None)
    return plan


def require_fit(recipe: Recipe, trust: Trust = NOTHING) -> None:
    """Refuse a recipe that does not fit the layers of its model, as `make_plan` does, but without torch: at once.

    Only a folder whose model has a row among the families tells its layers without torch; any other passes.

    Raises:
        UsageError: as `make_plan`, as far as groups, overrides and bits are concerned, or the folder's files are wrong.
    """
    if not (Path(recipe.model).expanduser() / "config.json").is_file():
        return
    source = open_source(recipe.source, trust)
    if not isinstance(source, QuantizedSource) and has_row(source.config):
        _assigned(recipe, source.linears())


def _assigned(recipe: Recipe, layers: list[Linear]) -> tuple[Recipe, dict[str, Method | None], dict[str, Any] | None]:
    """The recipe with every width decided, the method of every layer, and what `bits: auto` chooses from."""
    choices = None
    if recipe.allocation is not None:
        space = search_space(recipe, layers)
        recipe, choices = uniform_recipe(space), space.choices
    return recipe, assign(recipe, layers), choices


def refuse_images_for_auto(data: Data) -> None:
    """Raise UnsupportedError if `bits: auto` is to be calibrated on images."""
    if has_images(data):
        raise UnsupportedError(
            f"{label(data)} has rows with images: bits: auto compares models on text alone", hint=_USE_TEXT
        )


def _require_sight(plan: Plan, *, choosing_bits: bool) -> None:
    """Refuse what calibration with images cannot do.

    Raises:
        UsageError: the recipe asks for begin tokens, which the model's processor decides on.
        UnsupportedError: the model sees no images, or the recipe has something that only text can be used for.
    """
    source, recipe, data = plan.source, plan.recipe, plan.recipe.calibration.data
    if not source.family.dense_parts:
        raise UnsupportedError(f"{data} has rows with images, which {recipe.model} does not see", hint=_USE_TEXT)
    if choosing_bits:
        refuse_images_for_auto(data)
    if any(transform.whole_model for transform in recipe.all_transforms):
        raise UnsupportedError(
            f"{data} has rows with images: transforms of the whole model are trained on text alone",
            hint=f"teq's loss: block, or {_USE_TEXT}",
        )
    if recipe.bos != "auto":
        raise UsageError(f"bos: {str(recipe.bos).lower()}: the model's processor decides how rows with images begin")
    source.processor()


def _require_folds(transform: str, source: ModelSource) -> None:
    """Refuse a model in which no channels can be scaled."""
    family = source.family
    if not any(map(family.folds_of, range(source.n_blocks))):
        norm, reason = next(iter(family.unfolded.items()), ("", ""))
        because = f" ({norm}: {reason})" if norm else ""
        raise UnsupportedError(
            f"{transform} scales channels, and none of {family.model_type} can be shown to allow it{because}",
            hint="methods without transforms take any model, such as gptq-like",
        )


def _require_names(source: ModelSource, parts: Iterable[Iterable[str]], formats: Mapping[str, Format | None]) -> None:
    """Refuse a model whose tensors would not be found again under the names that a checkpoint has for them."""
    found: set[str] = set()
    for name in (name for part in parts for name in part):
        again, (layer, _, suffix) = source.name_in_model(source.on_disk(name)), name.rpartition(".")
        packed = formats.get(layer) is not None and suffix != "bias"
        if again in found or (packed and again != name):
            raise UnsupportedError(
                f"model type {source.family.model_type!r}: qcli does not know how a checkpoint names {name}"
            )
        found.add(again)


def _has_experts(source: ModelSource, layers: list[Linear]) -> bool:
    return any(source.family.groups_of(layer.block)[layer.group].experts for layer in layers)


def _divides(layer: Linear, method: Method, ranks: int) -> bool:
    """Whether rows and, group by group, columns can be split over `ranks` devices."""
    rows, columns = layer.shape
    if rows % ranks or columns % ranks:
        return False
    return method.unsupported_reason((rows, columns // ranks)) is None

"""The base class of export targets (`targets/`), and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from qcli.models.native import NativeSource
from qcli.models.open import ModelSource, open_packed
from qcli.utils import registry, shards
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.progress import Progress
from qcli.utils.safetensors import read_header
from qcli.utils.trust import Trust

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from qcli.core.activations import Activations
    from qcli.core.weight import Format, QuantizedWeight
    from qcli.models.families import Family, Linear
    from qcli.models.quantized import LayerStorage
    from qcli.utils.dtypes import StoredTensor

TARGETS = "qcli.export.targets"


class Refusal(NamedTuple):
    """Why an engine does not load a checkpoint, and flags of `qcli quantize` each of which gives one that it loads."""

    reason: str
    fitting: tuple[str, ...]


class Packable(Protocol):
    """A checkpoint to be packed, finished or planned: the members of `QuantizedSource` that `check` may use."""

    @property
    def path(self) -> Path: ...
    @property
    def family(self) -> Family: ...
    @property
    def activations(self) -> Activations | None: ...
    @property
    def quantized(self) -> Mapping[str, LayerStorage]: ...
    @property
    def vocabulary(self) -> Mapping[str, LayerStorage]: ...
    def formats(self) -> Mapping[str, Format]: ...
    def linears(self) -> list[Linear]: ...
    def tensors(self) -> dict[str, StoredTensor]: ...
    def hf_config(self) -> PreTrainedConfig: ...
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    def read_quantized(self, layer: str) -> QuantizedWeight: ...


class ExportTarget:
    """Writes a qcli checkpoint in one layout.

    Args:
        requantize: the type, of `requantize_types`, that layers are rounded to if the layout cannot store them
            exactly; None: they are refused.

    Raises:
        UsageError: the target does not round, or not to this type.
    """

    name: ClassVar[str]
    loading: ClassVar[str]
    """How to load the result, as Markdown for its model card; `DIR` stands for the folder."""

    hub_library: ClassVar[str] = "transformers"
    """The hub's name for the library that loads the result (`library_name` of its model card)."""

    requantize_types: ClassVar[tuple[str, ...]] = ()

    ragged_groups: ClassVar[bool] = False
    """Whether it stores rows whose last group is shorter."""

    def __init__(self, requantize: str | None = None) -> None:
        if requantize is not None and requantize not in self.requantize_types:
            if not self.requantize_types:
                raise UsageError(f"format {self.name} cannot requantize layers", hint="leave out --requantize")
            types = ", ".join(self.requantize_types)
            raise UsageError(f"format {self.name} cannot requantize to {requantize!r}", hint=f"known types: {types}")
        self.requantize = requantize

    def check(self, source: Packable) -> None:
        """Refuse what the layout cannot store, before anything is written.

        Raises:
            UnsupportedError: with the layer, the reason, and a target that can store it.
        """

    def refusals(self, source: Packable) -> dict[str, Refusal]:
        """Engines, of those that `loading` names, that do not load what the layout can store; known before writing."""
        return {}

    def proven_with(self, source: Packable) -> Sequence[str] | str:
        """Packages with which transformers loads the result, itself among them, to prove that it runs; or why none."""
        return ["transformers"]

    def loading_of(self, source: Packable) -> str:
        """`loading` as it is for this checkpoint, without the engines that refuse it."""
        return self.loading

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        """Write weights, config and tokenizer, in weight files of at most `shard_size` bytes of tensors."""
        raise NotImplementedError

    def open(self, folder: Path, trust: Trust) -> ModelSource:
        """Read back what was written."""
        return open_packed(folder, trust)

    def notes(self, source: Packable) -> dict[str, str]:
        """Remarks on the result, by label, for the terminal, the manifest and the model card."""
        return {}

    def tolerance(self, name: str, tensor: Tensor) -> float:
        """Largest absolute difference that is allowed when the tensor `name` is read back.

        Args:
            tensor: as the source has it.
        """
        return 0.0

    def rounded(self) -> list[str]:
        """Layers that were requantized, by name; known after `check`."""
        return []


def load_target(name: str, requantize: str | None) -> ExportTarget:
    """The export target of this name.

    Raises:
        UsageError: there is none, or it cannot requantize to this type.
    """
    known = registry.names(TARGETS)
    if name not in known:
        raise UsageError(f"unknown export target {name!r}", hint=f"known: {', '.join(known)}")
    target: ExportTarget = registry.load(TARGETS, name)(requantize)
    return target


def require_engines(target: ExportTarget, source: Packable) -> None:
    """Refuse a checkpoint that an engine of the target would not load.

    Raises:
        UnsupportedError: with the engines, their reasons, and flags that would fit.
    """
    refusals = target.refusals(source)
    if refusals:
        first, *others = (refusal.fitting for refusal in refusals.values())
        fitting = [flag for flag in first if all(flag in flags for flags in others)]
        raise UnsupportedError(
            *(f"{engine} does not load this as {target.name}: {why.reason}" for engine, why in refusals.items()),
            hint=(f"quantize with {' or '.join(fitting)}; or " if fitting else "")
            + "pack it as qcli or dense; --allow-refused (in a recipe `pack.allow_refused: true`) writes it for "
            "another engine",
        )


def refuse_extra_computation(source: Packable, layout: str) -> None:
    """Refuse checkpoints whose layers compute more than `x W^T + bias`.

    Raises:
        UnsupportedError: activations are quantized, or outputs are normalized.
    """
    if source.activations is not None:
        raise UnsupportedError(
            f"{source.path} quantizes activations to {source.activations.bits} bits, which {layout} cannot store",
            hint="pack it as qcli, or quantize without activations; compressed-tensors stores method fp8 with "
            "activations of type float",
        )
    normed = [layer for layer, format in source.formats().items() if format.has_output_norm]
    if normed:
        raise UnsupportedError(
            f"{source.path} normalizes the outputs of {len(normed)} layers, such as {normed[0]}, "
            f"which {layout} cannot store",
            hint="pack it as qcli, or quantize without `paper`",
        )


def refuse_vocabulary(source: Packable, layout: str) -> None:
    """Refuse checkpoints whose embedding or head is quantized.

    Raises:
        UnsupportedError: one of them is.
    """
    if source.vocabulary:
        raise UnsupportedError(
            f"{', '.join(source.vocabulary)}: {layout} packs linear layers of blocks alone",
            hint="pack it as qcli, gguf or dense, or quantize without `lm_head` and `embeddings`",
        )


def write_layers(
    source: NativeSource,
    folder: Path,
    shard_size: int,
    progress: Progress,
    tensors: Callable[[str], Mapping[str, Tensor]],
) -> None:
    """Write safetensors shards, holding one tensor of the dense model in memory at a time.

    Args:
        tensors: from the name of a tensor of the dense model to the tensors stored for it, by name, if any; they are
            written under their names on disk.
    """
    names, parts = list(source.tensors()), []
    for number, name in enumerate(names):
        progress("write", number, len(names))
        if stored := _as_on_disk(source, tensors(name)):
            parts.append(folder / f"part-{number:06d}.safetensors")
            shards.write_tensors(parts[-1], stored)
    shards.join([read_header(part) for part in parts], folder, shard_size)
    for part in parts:
        part.unlink()
    progress("write", len(names), len(names))


def _as_on_disk(source: NativeSource, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names on disk."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found |= source.as_on_disk(name, value, partial(_rows, value))
    return found


def _rows(whole: Tensor, start: int, stop: int) -> Tensor:
    return whole[start:stop]


def dense_config(source: ModelSource) -> dict[str, Any]:
    """The source's `config.json` without its `quantization_config`."""
    return {key: value for key, value in source.config_to_write().items() if key != "quantization_config"}

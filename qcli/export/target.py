"""What a layout has to do: the base class of `exports/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from qcli.models.native import NativeSource
from qcli.models.open import Source, open_packed
from qcli.utils import shards
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.progress import Progress
from qcli.utils.safetensors import read_header

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from qcli.core.activations import Activations
    from qcli.core.weight import Format, QuantizedWeight
    from qcli.models.families import Family, Linear
    from qcli.models.quantized import LayerStorage
    from qcli.utils.dtypes import StoredTensor


class Packable(Protocol):
    """A qcli checkpoint before it is packed, or a plan of one; see `QuantizedSource`, whose members these are."""

    @property
    def path(self) -> Path: ...
    @property
    def family(self) -> Family: ...
    @property
    def activations(self) -> Activations | None: ...
    @property
    def quantized(self) -> Mapping[str, LayerStorage]: ...
    def formats(self) -> Mapping[str, Format]: ...
    def linears(self) -> list[Linear]: ...
    def tensors(self) -> dict[str, StoredTensor]: ...
    def hf_config(self) -> PreTrainedConfig: ...
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    def read_quantized(self, layer: str) -> QuantizedWeight: ...


class Export:
    """Writes a qcli checkpoint in one layout.

    Args:
        requantize: the type that weights are rounded to which the layout cannot hold as they are; None: refuse them.
    """

    name: ClassVar[str]
    loading: ClassVar[str]
    """How to load the result, as Markdown for its model card; `DIR` is the folder."""

    requantizes: ClassVar[bool] = False

    def __init__(self, requantize: str | None = None) -> None:
        if requantize is not None and not self.requantizes:
            raise UsageError(f"{self.name} rounds nothing to {requantize}", hint="--requantize belongs to gguf")
        self.requantize = requantize

    def check(self, source: Packable) -> None:
        """Refuse what does not fit, before anything is written.

        Raises:
            UnsupportedError: with the layer, the reason, and the layout that would fit.
        """

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        """Write the weights, and whatever else loading takes, in files of at most `shard_size` bytes of tensors."""
        raise NotImplementedError

    def open(self, folder: Path) -> Source:
        """What was written, read back."""
        return open_packed(folder)

    def notes(self, source: NativeSource) -> dict[str, str]:
        """What else is worth knowing of the result, by label."""
        return {}

    def tolerance(self, name: str, tensor: Tensor) -> float:
        """How far values of this tensor, `tensor` in the source, may be from what they were."""
        return 0.0

    def rounded(self) -> list[str]:
        """Layers that are not what they were, because rounding them was asked for."""
        return []


def refuse_what_runs_otherwise(source: Packable, layout: str) -> None:
    """Raise UnsupportedError where a checkpoint is more than its weights: quantized activations, normed outputs."""
    if source.activations is not None:
        raise UnsupportedError(
            f"{source.path} quantizes activations to {source.activations.bits} bits, {layout} cannot hold that",
            hint="pack it as qcli, or quantize without activations",
        )
    normed = [layer for layer, format in source.formats().items() if format.has_output_norm]
    if normed:
        raise UnsupportedError(
            f"{source.path} norms the outputs of {len(normed)} layers, {normed[0]} first, {layout} cannot hold that",
            hint="pack it as qcli, or quantize without `paper`",
        )


def write_layers(
    source: NativeSource,
    folder: Path,
    shard_size: int,
    progress: Progress,
    tensors: Callable[[str], Mapping[str, Tensor]],
) -> None:
    """Write safetensors shards, one tensor of the dense model after the other.

    Args:
        tensors: what stands in the file for the dense model's tensor of this name, by name.
    """
    names, parts = list(source.tensors()), []
    for number, name in enumerate(names):
        progress("write", number, len(names))
        parts.append(folder / f"part-{number:06d}.safetensors")
        shards.write_tensors(parts[-1], tensors(name))
    shards.join([read_header(part) for part in parts], folder, shard_size)
    for part in parts:
        part.unlink()
    progress("write", len(names), len(names))


def dense_config(source: NativeSource) -> dict[str, Any]:
    """The source's `config.json` without what says how it is quantized."""
    return {key: value for key, value in source.config.items() if key != "quantization_config"}

"""Whether an export target can store a checkpoint, by its formats alone: before it is made, or without reading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qcli.core.activations import Activations
from qcli.core.formats.affine import Affine
from qcli.core.weight import Format
from qcli.export.target import load_target, require_engines
from qcli.models.families import Family, Linear
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.models.quantized import LayerStorage
from qcli.quantization.plan import Plan
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import QcliError, UnsupportedError
from qcli.utils.trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from qcli.core.weight import QuantizedWeight


def require_packable(
    plan: Plan, out: Path, format: str, requantize: str | None, *, allow_refused: bool = False
) -> None:
    """Refuse a plan whose checkpoint `pack` would refuse whatever its values; what depends on them is left to `pack`.

    Args:
        allow_refused: as `pack`.

    Raises:
        UsageError, UnsupportedError: as `pack`.
    """
    target, planned = load_target(format, requantize), PlannedCheckpoint(plan, out)
    target.check(planned)
    if not allow_refused:
        require_engines(target, planned)


def surely_packable(run: Path, formats: Sequence[str], trust: Trust) -> str | None:
    """The first of these export targets that stores the finished checkpoint in `run` whatever its values; None: none is
    certain to. No weight is read, so that the answer takes as long for a large model as for a small one."""
    source = open_source(str(run), trust)
    if not isinstance(source, NativeSource):
        return None
    unread = _Unread(source.path, source.config, trust_remote_code=trust.remote_code)
    for format in formats:
        target = load_target(format, None)
        try:
            unread.companions()
            target.check(unread)
            require_engines(target, unread)
        except QcliError:
            continue
        return format
    return None


class _Unread(NativeSource):
    """A finished checkpoint that gives, in place of a weight, the hardest of its format to store."""

    def read_quantized(self, layer: str) -> QuantizedWeight:
        """Two rows with the lowest and the highest code, at the lowest and at the highest zero point; the scale, like
        real ones, has inexact products.

        Raises:
            UnsupportedError: the format has no weight that is as hard to store as any other.
        """
        import torch

        from qcli.core.weight import QuantizedWeight

        storage = self.packed[layer]
        format, columns = storage.format, storage.shape[1]
        if not isinstance(format, Affine) or format.zero_point == "float":
            raise UnsupportedError(f"whether {layer} can be stored depends on its weights")
        ends, groups = torch.tensor([format.lowest, format.highest], dtype=torch.uint8), format.groups(columns)
        codes = ends[torch.arange(columns) % 2].expand(2, columns)
        tables = {"weight_scale": torch.full((2, groups), 0.3, dtype=torch.float16)}
        if format.zero_point == "integer":
            tables["weight_zero_point"] = ends[:, None].expand(2, groups)
        return QuantizedWeight(format, (2, columns), codes, tables)


class PlannedCheckpoint:
    """The checkpoint that a plan will give in the folder `out`, as far as `ExportTarget.check` reads it."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self._plan = plan
        self.path = out
        self.family: Family = plan.source.family
        self.activations: Activations | None = plan.recipe.activations

    @cached_property
    def quantized(self) -> dict[str, LayerStorage]:
        shapes = {layer.name: layer.shape for layer in self._plan.layers}
        return {layer: LayerStorage(format, shapes[layer]) for layer, format in self.formats().items()}

    @property
    def vocabulary(self) -> Mapping[str, LayerStorage]:
        return self._plan.vocabulary_storage

    def formats(self) -> Mapping[str, Format]:
        return {layer: format for layer, format in self._plan.formats.items() if format is not None}

    def linears(self) -> list[Linear]:
        return self._plan.layers

    def tensors(self) -> dict[str, StoredTensor]:
        source = self._plan.source
        return {
            name: StoredTensor(source.dense_dtype or dtype, shape) for name, (dtype, shape) in source.tensors().items()
        }

    def hf_config(self) -> PreTrainedConfig:
        return self._plan.source.hf_config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._plan.source.tokenizer()

    def read_quantized(self, layer: str) -> QuantizedWeight:
        """A single row of zero codes, the easiest weight to store: if a layout cannot store this one, it can store none
        of the format. Floating-point tables hold 0.3, which like real tables is no integer and has inexact products."""
        import torch

        storage = self.quantized[layer] if layer in self.quantized else self.vocabulary[layer]
        format, shape = storage.format, (1, storage.shape[1])
        stored = {}
        for name, tensor in format.stored(shape).items():
            table = torch.zeros(tensor.shape, dtype=tensor.torch_dtype)
            stored[name] = table + 0.3 if table.is_floating_point() else table
        return format.from_stored(stored, shape)

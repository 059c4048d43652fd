"""qcli checkpoints in vLLM: each device keeps its shard of a layer packed, and computes it by the backends of qcli.

vLLM fuses q, k and v into one layer, and gate and up; tensor parallelism splits some layers by outputs, others by
inputs. Here a fused layer has a `_Shard` for each layer of the checkpoint, cut out as soon as all tensors of that layer
have been read. Written against vLLM's base classes (QuantizationConfig, LinearMethodBase, and the way models call
`weight_loader`; main of autumn 2026); docs/engines.md says what has been run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qcli.core import packing
from qcli.core.weight import Format, QuantizedWeight
from qcli.inference.linear import QuantLinear
from qcli.models.native import GUARD, NativeStorage
from qcli.models.quantized import LayerStorage
from qcli.utils.errors import UnsupportedError

_PARTS = {"q": 0, "k": 1, "v": 2}  # vLLM's ids of the layers inside a fused one; others are numbers


class QcliConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a qcli checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.storage = NativeStorage(config)
        if self.storage.activations is not None:
            raise UnsupportedError("vLLM cannot simulate quantized activations", hint="quantize without them")
        if self.storage.vocabulary:
            raise UnsupportedError(
                f"{', '.join(self.storage.vocabulary)}: qcli's layers in vLLM are those of blocks alone",
                hint="quantize without `lm_head` and `embeddings`",
            )

    def get_name(self) -> str:
        """The `quant_method` in `config.json`."""
        return "qcli"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the backends."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Whatever vLLM itself needs; without Triton's kernels plain PyTorch computes the layers."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None besides `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QcliConfig:
        """From `config.json > quantization_config`."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer computes; None for modules that are not linear layers.

        Args:
            prefix: name of the layer; fused layers have one of their own.

        Raises:
            UnsupportedError: a fused layer is only partly quantized, or in a format that cannot be split.
        """
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        layers = [stored for name in names if (stored := self.storage.layer(name)) is not None]
        if not layers:
            return UnquantizedLinearMethod()
        if len(layers) < len(names):
            raise UnsupportedError(f"{prefix}: vLLM computes {', '.join(names)} as one layer, some of them are dense")
        unsplittable = {stored.format.name for stored in layers if stored.format.column_step is None}
        if unsplittable:
            raise UnsupportedError(f"{prefix} is {min(unsplittable)}, which vLLM cannot load", hint="pack it as dense")
        guard = self.storage.guard
        return QcliLinearMethod(prefix, layers, guarded=guard is not None and guard.removesuffix(".weight") in names)


class QcliLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer of vLLM, made of one or several layers of the checkpoint.

    Args:
        guarded: whether the checkpoint's guard belongs to one of them; it is read and dropped.
    """

    def __init__(self, prefix: str, storages: Sequence[LayerStorage], *, guarded: bool = False) -> None:
        self.prefix, self.storages, self.guarded = prefix, storages, guarded

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register empty parameters, named as on disk, whose loaders pass tensors to the shards."""
        rank, ranks = int(layer.tp_rank), int(layer.tp_size)
        sizes = output_partition_sizes if len(self.storages) > 1 else [sum(output_partition_sizes)]
        if len(output_partition_sizes) > 1 and len(self.storages) == 1 and ranks > 1:
            raise UnsupportedError(
                f"{self.prefix} is a single layer in the checkpoint, tensor parallelism would split it"
            )
        shards = [
            _Shard(self.prefix, storage, (size, input_size_per_partition), rank, ranks, params_dtype)
            for storage, size in zip(self.storages, sizes, strict=True)
        ]
        layer.qcli_shards = nn.ModuleList(shards)
        for suffix in dict.fromkeys(name for shard in shards for name in shard.suffixes):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = _loader(shards, suffix)  # type: ignore[attr-defined]
            layer.register_parameter(suffix, parameter)
        if self.guarded:
            guard = nn.Parameter(torch.empty(GUARD.shape, dtype=GUARD.torch_dtype), requires_grad=False)
            guard.weight_loader = lambda *_: None  # type: ignore[attr-defined]
            layer.register_parameter("weight", guard)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse layers with tensors that were not read, about which vLLM's loader only warns."""
        for shard in layer.qcli_shards:
            shard.require_whole()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[..., in]` -> `[..., out]` for this device's shards."""
        outputs = [shard(x) for shard in layer.qcli_shards]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output if bias is None else output + bias


class _Shard(nn.Module):
    """The rows and columns of one layer that this device computes."""

    def __init__(
        self, prefix: str, storage: LayerStorage, shape: tuple[int, int], rank: int, ranks: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        (all_rows, all_columns), (rows, columns) = storage.shape, shape
        if all_rows % rows or all_columns % columns:
            raise UnsupportedError(f"{prefix}: {storage.shape} cannot be split into parts of {shape}")
        self.prefix, self.storage, self.shape, self._dtype = prefix, storage, shape, dtype
        # With fewer shards than devices, neighbours have the same one, as vLLM replicates heads of k and v.
        row = rank * (all_rows // rows) // ranks * rows
        column = rank * (all_columns // columns) // ranks * columns
        self._rows, self._columns = slice(row, row + rows), slice(column, column + columns)
        self.suffixes = tuple(storage.format.stored(storage.shape))
        self._gathered: dict[str, Tensor] = {}
        self.linear: QuantLinear | None = None
        self._check(ranks)

    def gather(self, suffix: str, tensor: Tensor) -> None:
        """Take a tensor of the whole layer; after the last one, cut out the shard."""
        self._gathered[suffix] = tensor
        if len(self._gathered) < len(self.suffixes):
            return
        format, stored = self.storage.format, self._gathered
        if self.shape != self.storage.shape:
            format, stored = _cut(self.storage, stored, self._rows, self._columns)
        linear = QuantLinear(format, self.shape[1], self.shape[0], compute_dtype=self._dtype)
        linear.load_state_dict(stored, assign=True)
        linear.name = self.prefix
        self.linear, self._gathered = linear, {}

    def require_whole(self) -> None:
        """Raise UnsupportedError unless all tensors of the layer have been read."""
        if self.linear is None:
            missing = next(suffix for suffix in self.suffixes if suffix not in self._gathered)
            raise UnsupportedError(f"{self.prefix}: the checkpoint has no {missing}", hint="run `qcli verify` on it")

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., columns]` -> `[..., rows]`."""
        assert self.linear is not None  # `require_whole`
        y: Tensor = self.linear(x)
        return y

    def _check(self, ranks: int) -> None:
        format, columns = self.storage.format, self.shape[1]
        if format.has_output_norm:
            raise UnsupportedError(
                f"{self.prefix} normalizes its outputs, which vLLM's layers cannot", hint="use transformers"
            )
        step = format.column_step
        if columns < self.storage.shape[1] and (step is None or columns % step):
            raise UnsupportedError(
                f"{self.prefix}: {columns} inputs per device are not whole groups of {step}",
                hint=f"tensor parallel size {ranks} needs smaller groups",
            )


def _cut(
    storage: LayerStorage, tensors: Mapping[str, Tensor], rows: slice, columns: slice
) -> tuple[Format, dict[str, Tensor]]:
    """Some rows and columns of a layer as a layer of their own: its format and stored tensors."""
    packed = tensors.get("weight_packed")
    no_codes = {} if packed is None else {"weight_packed": packed[:0]}
    tables = storage.format.from_stored({**tensors, **no_codes}, storage.shape).tables
    format, tables = storage.format.cut(tables, rows, columns)
    shape = rows.stop - rows.start, columns.stop - columns.start
    codes = torch.empty(0, shape[1], dtype=torch.uint8, device=next(iter(tensors.values())).device)
    stored = format.to_stored(QuantizedWeight(format, shape, codes, tables))
    stored = {name: tensor.clone() for name, tensor in stored.items()}  # views would keep all of the layer
    if packed is not None:
        stored["weight_packed"] = packing.cut_columns(packed[rows], format.bits, storage.shape[1], columns)
    return format, stored


def _loader(shards: Sequence[_Shard], suffix: str) -> Callable[..., None]:
    """The `weight_loader` that vLLM's models call with each tensor, and with the part's id if the layer is fused."""

    def load(parameter: nn.Parameter, tensor: Tensor, part: str | int | None = None) -> None:
        index = 0 if part is None else _PARTS.get(str(part), part)
        shards[int(index)].gather(suffix, tensor.to(parameter.device, copy=True))

    return load

"""qcli checkpoints in vLLM: each device keeps its share of a layer's codes, packed, and decodes it as it computes.

vLLM computes q, k and v as one layer, and gate and up; it splits outputs of some layers and inputs of others over
devices. Here a fused layer holds a `_Share` for each layer of the checkpoint, cut out of the whole as soon as all of
its tensors have been read. Written against vLLM's base classes (QuantizationConfig, LinearMethodBase, and the way
models call `weight_loader`; main of autumn 2026). docs/engines.md says what of it has been run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qcli.core import packing
from qcli.core.formats._grouped import Grouped
from qcli.core.weight import QuantizedWeight
from qcli.inference.linear import linear
from qcli.models.native import NativeStorage
from qcli.models.quantized import LayerStorage
from qcli.utils.errors import UnsupportedError

_NAMES = {"affine", "codebook", "dual-binary", "sign"}
_PARTS = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the layers inside a fused one; others have numbers


class QcliConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a qcli checkpoint."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.storage = NativeStorage(config)
        if self.storage.activations is not None:
            raise UnsupportedError("vLLM cannot simulate quantized activations", hint="quantize without them")

    def get_name(self) -> str:
        """What `config.json` calls the method."""
        return "qcli"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Decoding knows every dtype."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Plain PyTorch, so whatever vLLM itself runs on."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing beside `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QcliConfig:
        """From `config.json > quantization_config`."""
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer computes; None for what is no linear layer.

        Args:
            prefix: the layer's name, that of a fused one where vLLM fuses.

        Raises:
            UnsupportedError: a fused layer is only partly quantized, or in a format that cannot be split.
        """
        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]
        parts = [self.storage.layer(name) for name in names]
        packed = [part for part in parts if part is not None]
        if not packed:
            return UnquantizedLinearMethod()
        if len(packed) < len(parts):
            raise UnsupportedError(f"{prefix}: vLLM computes {', '.join(names)} as one layer, some of them are dense")
        others = {part.format.name for part in packed} - _NAMES
        if others:
            raise UnsupportedError(f"{prefix} is {min(others)}, which vLLM cannot load", hint="pack it as dense")
        return QcliLinearMethod(prefix, packed)


class QcliLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer of vLLM, of one or several layers of the checkpoint."""

    def __init__(self, prefix: str, storages: Sequence[LayerStorage]) -> None:
        self.prefix, self.storages = prefix, storages

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
        """Parameters under the names on disk, empty, whose loaders gather what is read."""
        rank, ranks = int(layer.tp_rank), int(layer.tp_size)
        sizes = output_partition_sizes if len(self.storages) > 1 else [sum(output_partition_sizes)]
        if len(output_partition_sizes) > 1 and len(self.storages) == 1 and ranks > 1:
            raise UnsupportedError(f"{self.prefix} is one layer in the checkpoint, which tensor parallel would split")
        shares = [
            _Share(self.prefix, storage, size, input_size_per_partition, rank, ranks)
            for storage, size in zip(self.storages, sizes, strict=True)
        ]
        layer.qcli_shares = nn.ModuleList(shares)
        for suffix in dict.fromkeys(name for share in shares for name in share.suffixes):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = _loader(shares, suffix)  # type: ignore[attr-defined]
            layer.register_parameter(suffix, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse layers of which something was not read; transformers' and vLLM's loaders only warn."""
        for share in layer.qcli_shares:
            share.require_whole()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[..., in]` -> `[..., out]`, of this device's share."""
        parts = [share(x) for share in layer.qcli_shares]
        found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return found if bias is None else found + bias


class _Share(nn.Module):
    """The rows and columns of one layer that this device computes."""

    codes: Tensor

    def __init__(self, prefix: str, storage: LayerStorage, rows: int, columns: int, rank: int, ranks: int) -> None:
        super().__init__()
        all_rows, all_columns = storage.shape
        if all_rows % rows or all_columns % columns:
            raise UnsupportedError(f"{prefix}: {storage.shape} cannot be split into parts of {(rows, columns)}")
        self.prefix, self.storage, self.shape = prefix, storage, (rows, columns)
        # Where there are fewer parts than devices, neighbours have the same one, as vLLM copies heads of k and v.
        row = rank * (all_rows // rows) // ranks * rows
        column = rank * (all_columns // columns) // ranks * columns
        self._rows, self._columns = slice(row, row + rows), slice(column, column + columns)
        self.suffixes = tuple(storage.format.stored(storage.shape))
        self._gathered: dict[str, Tensor] = {}
        self._check(ranks)

    def gather(self, suffix: str, tensor: Tensor) -> None:
        """Take a tensor of the whole layer; with the last one the share is cut out."""
        self._gathered[suffix] = tensor
        if len(self._gathered) < len(self.suffixes):
            return
        format = self.storage.format
        whole = format.from_stored(self._gathered, self.storage.shape)
        codes = whole.codes[self._rows, self._columns].contiguous()
        tables = format.slice_columns(format.slice_rows(format.float_tables(whole.tables), self._rows), self._columns)
        self.register_buffer("codes", packing.pack(codes, format.bits))
        for name, table in tables.items():
            self.register_buffer(name, table.clone())
        self._tables = tuple(tables)
        self._gathered = {}

    def require_whole(self) -> None:
        """Raise UnsupportedError unless all tensors of the layer have been read."""
        missing = [suffix for suffix in self.suffixes if suffix not in self._gathered]
        if not hasattr(self, "codes"):
            raise UnsupportedError(f"{self.prefix}: the checkpoint has no {missing[0]}", hint="run `qcli verify` on it")

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., columns]` -> `[..., rows]`."""
        codes = packing.unpack(self.codes, self.storage.format.bits, self.shape[1])
        tables = {name: getattr(self, name) for name in self._tables}
        return linear(x, QuantizedWeight(self.storage.format, self.shape, codes, tables))

    def _check(self, ranks: int) -> None:
        format, columns = self.storage.format, self.shape[1]
        if format.has_output_norm:
            raise UnsupportedError(
                f"{self.prefix} norms its outputs, which vLLM's layers do not", hint="use transformers"
            )
        split = columns < self.storage.shape[1]
        if split and isinstance(format, Grouped) and format.group_size > 0 and columns % format.group_size:
            raise UnsupportedError(
                f"{self.prefix}: {columns} inputs a device are no whole groups of {format.group_size}",
                hint=f"tensor parallel {ranks} needs smaller groups",
            )


def _loader(shares: Sequence[_Share], suffix: str) -> Callable[..., None]:
    """What vLLM's models call with each tensor: `loader(parameter, tensor)`, with the part's name where it is fused."""

    def load(parameter: nn.Parameter, tensor: Tensor, part: str | int | None = None) -> None:
        index = 0 if part is None else _PARTS.get(str(part), part)
        shares[int(index)].gather(suffix, tensor.to(parameter.device))

    return load

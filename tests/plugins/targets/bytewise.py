"""The layout `bytewise`, for ternary layers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qcli.export.target import ExportTarget, Packable, dense_config, refuse_extra_computation, write_layers
from qcli.models.native import NativeSource
from qcli.utils.errors import UnsupportedError
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bytewise"]


class Bytewise(ExportTarget):
    """`quant_method: bytewise`."""

    name: ClassVar[str] = "bytewise"
    loading: ClassVar[str] = "Loads in qcli."

    def check(self, source: Packable) -> None:
        refuse_extra_computation(source, self.name)
        for layer, format in source.formats().items():
            if format.name != "ternary":
                raise UnsupportedError(f"{layer} is {format.name}, {self.name} stores only ternary")

    def proven_with(self, source: Packable) -> str:
        return "transformers does not know this layout"

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        layout: Any = import_module("qcli.models.layouts.bytewise")

        def stored(name: str) -> dict[str, Tensor]:
            layer = name.removesuffix(".weight")
            if layer not in source.quantized:
                return source.read([name])
            tensors: dict[str, Tensor] = layout.tensors(layer, source.read_quantized(layer))
            return tensors

        write_layers(source, folder, shard_size, progress, stored)
        shapes = {layer: storage.shape for layer, storage in source.quantized.items()}
        config = dense_config(source) | {"quantization_config": layout.quantization_config(shapes)}
        write_json(folder / "config.json", config)
        source.copy_companions(folder)

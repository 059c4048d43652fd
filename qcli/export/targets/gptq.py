"""The original GPTQ layout, for engines that read no newer one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcli.core.formats.affine import Affine
from qcli.export.target import (
    ExportTarget,
    Packable,
    dense_config,
    refuse_extra_computation,
    refuse_vocabulary,
    write_layers,
)
from qcli.export.targets._affine import affine_formats, refuse_conv1d, refuse_dense_parts
from qcli.models.layouts import gptq as layout
from qcli.models.native import NativeSource
from qcli.utils.errors import UnsupportedError
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GPTQ"]

_BITS = (4, 8)
_HINT = "pack it as qcli or dense"


class GPTQ(ExportTarget):
    """`quant_method: gptq`: symmetric, 4 or 8 bits, all layers alike."""

    name: ClassVar[str] = layout.NAME
    loading: ClassVar[str] = """Loads in engines that read GPTQ (`checkpoint_format: gptq`), vLLM among them.

```console
$ vllm serve DIR --dtype float16
```"""

    def check(self, source: Packable) -> None:
        refuse_extra_computation(source, self.name)
        refuse_vocabulary(source, self.name)
        refuse_conv1d(source, self.name)
        refuse_dense_parts(source, self.name)
        _format(source)

    def proven_with(self, source: Packable) -> Sequence[str] | str:
        return "engines of this layout need kernels of their own; its files were read back by qcli"

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        def packed(name: str) -> dict[str, Tensor]:
            layer = name.removesuffix(".weight")
            if layer not in source.quantized:
                return source.read([name])
            return layout.tensors(layer, source.read_quantized(layer))

        write_layers(source, folder, shard_size, progress, packed)
        quantization = layout.quantization_config(_format(source))
        write_json(folder / "config.json", dense_config(source) | {"quantization_config": quantization})
        source.copy_companions(folder)


def _format(source: Packable) -> Affine:
    """The single format of all layers.

    Raises:
        UnsupportedError: layers are dense or differ in their formats, or the layout cannot store this one.
    """
    formats = affine_formats(source, layout.NAME)
    first, common = next(iter(formats.items()))
    for layer in source.linears():
        format, (rows, columns) = formats.get(layer.name), layer.shape
        if format is None:
            raise UnsupportedError(f"{layer.name} is dense, gptq quantizes every layer of a block", hint=_HINT)
        if format != common:
            raise UnsupportedError(f"{layer.name} has another format than {first}, gptq allows only one", hint=_HINT)
        if format.bits not in _BITS or format.zero_point != "none":
            kind = "symmetric" if format.zero_point == "none" else "asymmetric"
            raise UnsupportedError(
                f"{layer.name} is {format.bits} bits {kind}, gptq stores 4 and 8 bits symmetric", hint=_HINT
            )
        if rows * format.bits % 32 or columns * format.bits % 32:
            raise UnsupportedError(f"{layer.name} is {rows} x {columns}, which does not fill 32-bit words", hint=_HINT)
    return common

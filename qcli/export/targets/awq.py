"""AutoAWQ's layout, which vLLM, SGLang, TGI and transformers (with GPTQModel) read: 4 bits with zero points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcli.core.formats.affine import Affine
from qcli.export.target import (
    ExportTarget,
    Packable,
    Refusal,
    dense_config,
    refuse_extra_computation,
    refuse_vocabulary,
    write_layers,
)
from qcli.export.targets._affine import (
    affine_formats,
    refuse_conv1d,
    refuse_dense_parts,
    refuse_mixed_fusions,
    with_format,
)
from qcli.models.layouts import awq as layout
from qcli.models.native import NativeSource
from qcli.utils.errors import UnsupportedError
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AWQ"]

_HINT = "pack it as qcli or dense"
_VLLM, _TRANSFORMERS = "vLLM", "transformers"
_GROUPS = (32, 64, 128, -1)  # MARLIN_SUPPORTED_GROUP_SIZES of vLLM's marlin_utils.py
# Models in which transformers (integrations/awq.py) multiplies activations by scales that only AutoAWQ makes.
_SCALED = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")
_LOADING = {
    _VLLM: """Loads in vLLM, which needs nothing but the folder.

```console
$ vllm serve DIR --dtype float16
```""",
    _TRANSFORMERS: """Loads in transformers with `pip install gptqmodel accelerate`.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="float16", device_map="auto")
```""",
}


class AWQ(ExportTarget):
    """`quant_method: awq`, version `gemm`: 4 bits, all quantized layers alike."""

    name: ClassVar[str] = layout.NAME
    loading: ClassVar[str] = "\n\n".join(_LOADING.values())

    def check(self, source: Packable) -> None:
        refuse_extra_computation(source, self.name)
        refuse_vocabulary(source, self.name)
        refuse_conv1d(source, self.name)
        refuse_dense_parts(source, self.name)
        refuse_mixed_fusions(source.linears(), affine_formats(source, self.name), self.name)
        _format(source)

    def refusals(self, source: Packable) -> dict[str, Refusal]:
        size, refusals = _format(source).group_size, {}
        if size not in _GROUPS:
            fitting = tuple(f"--group-size {each}" for each in _GROUPS)
            refusals[_VLLM] = Refusal(f"groups of {size}, its kernels take 32, 64, 128 and whole rows", fitting)
        if source.family.model_type in _SCALED:
            reason = f"in {source.family.model_type} it expects scales of activations"
            refusals[_TRANSFORMERS] = Refusal(reason, ())
        return refusals

    def proven_with(self, source: Packable) -> Sequence[str] | str:
        return "engines of this layout need kernels of their own; its files were read back by qcli"

    def loading_of(self, source: Packable) -> str:
        refused = self.refusals(source)
        return "\n\n".join(text for engine, text in _LOADING.items() if engine not in refused)

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        formats = affine_formats(source, self.name)

        def packed(name: str) -> dict[str, Tensor]:
            layer = name.removesuffix(".weight")
            if layer not in formats:
                return source.read([name])
            return layout.tensors(layer, with_format(source.read_quantized(layer), formats[layer]))

        write_layers(source, folder, shard_size, progress, packed)
        dense = [layer.name for layer in source.linears() if layer.name not in formats]
        quantization = layout.quantization_config(_format(source), dense)
        write_json(folder / "config.json", dense_config(source) | {"quantization_config": quantization})
        source.copy_companions(folder)


def _format(source: Packable) -> Affine:
    """The single format of all quantized layers, but for their zero points.

    Raises:
        UnsupportedError: layers differ in their groups, or the layout cannot store one.
    """
    formats = affine_formats(source, layout.NAME)
    first, common = next(iter(formats.items()))
    for name, format in formats.items():
        rows = source.quantized[name].shape[0]
        if format.bits != layout.BITS:
            raise UnsupportedError(f"{name} has {format.bits} bits, {layout.NAME} stores {layout.BITS}", hint=_HINT)
        if format.group_size != common.group_size:
            raise UnsupportedError(
                f"{name} has other groups than {first}, {layout.NAME} allows only one size", hint=_HINT
            )
        if rows % layout.PER_WORD:
            raise UnsupportedError(
                f"{name} has {rows} outputs, {layout.NAME} packs {layout.PER_WORD} of them into a word", hint=_HINT
            )
    return common

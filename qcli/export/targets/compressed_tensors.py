"""compressed-tensors: vLLM, SGLang and transformers load it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from qcli.export.targets import _vllm_rules
from qcli.export.targets._affine import affine_formats, refuse_mixed_fusions, with_format
from qcli.models.families import Family
from qcli.models.layouts import compressed_tensors as layout
from qcli.models.native import NativeSource
from qcli.utils.errors import UnsupportedError
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressedTensors"]


_VLLM, _TRANSFORMERS = "vLLM", "transformers"
_LOADING = {
    _VLLM: """Loads in vLLM, by its rules.

```console
$ vllm serve DIR
```""",
    _TRANSFORMERS: """Loads in transformers with the package `compressed-tensors` (0.18 or later).

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="float16")
```""",
}


class CompressedTensors(ExportTarget):
    """`quant_method: compressed-tensors`, format `pack-quantized`."""

    name: ClassVar[str] = layout.NAME
    loading: ClassVar[str] = "\n\n".join(_LOADING.values())

    def check(self, source: Packable) -> None:
        refuse_extra_computation(source, self.name)
        refuse_vocabulary(source, self.name)
        if source.family.conv1d:
            raise UnsupportedError(
                f"{source.family.model_type} has no nn.Linear layers, the only ones that {self.name} packs",
                hint="pack it as qcli or dense",
            )
        refuse_mixed_fusions(source.linears(), affine_formats(source, self.name), self.name)

    def refusals(self, source: Packable) -> dict[str, Refusal]:
        formats = affine_formats(source, self.name)
        refusals = {
            _VLLM: _vllm_rules.refusal(source, formats),
            _TRANSFORMERS: _transformers_refusal(formats, source.family),
        }
        return {engine: refusal for engine, refusal in refusals.items() if refusal is not None}

    def proven_with(self, source: Packable) -> Sequence[str] | str:
        refusal = self.refusals(source).get(_TRANSFORMERS)
        return ["transformers", "compressed-tensors"] if refusal is None else "transformers does not load it"

    def loading_in(self, refused: Collection[str]) -> str:
        loading = [text for engine, text in _LOADING.items() if engine not in refused]
        if refused:
            loading.append(f"Does not load in {' and '.join(refused)}, for the reason in the table above.")
        loading.append("Scales are float16; in `bfloat16` an engine rounds them to 8 bits of precision.")
        return "\n\n".join(loading)

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        formats = affine_formats(source, self.name)

        def packed(name: str) -> dict[str, Tensor]:
            layer = name.removesuffix(".weight")
            if layer not in formats:
                return source.read([name])
            return layout.tensors(layer, with_format(source.read_quantized(layer), formats[layer]))

        write_layers(source, folder, shard_size, progress, packed)
        layers = source.linears()
        quantization = layout.quantization_config(
            layers, source.family, {layer.name: formats.get(layer.name) for layer in layers}
        )
        write_json(folder / "config.json", dense_config(source) | {"quantization_config": quantization})
        source.copy_companions(folder)

    def notes(self, source: Packable) -> dict[str, str]:
        refused = {engine: f"does not load it: {why.reason}" for engine, why in self.refusals(source).items()}
        return {_VLLM: _vllm_rules.describe(source, affine_formats(source, self.name))} | refused


def _transformers_refusal(formats: Mapping[str, Affine], family: Family) -> Refusal | None:
    if layout.transformers_reads(formats.values(), family):
        return None
    if family.own_linear:
        return Refusal(f"layers of several formats in a {family.model_type} model", ("one format for all layers",))
    return Refusal("asymmetric layers beside layers of another format", ("--symmetric",))

"""compressed-tensors: vLLM, SGLang and transformers load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcli.export.target import ExportTarget, Packable, dense_config, refuse_extra_computation, write_layers
from qcli.export.targets import _vllm_rules
from qcli.export.targets._affine import affine_formats, refuse_mixed_fusions, with_format
from qcli.models.layouts import compressed_tensors as layout
from qcli.models.native import NativeSource
from qcli.utils.errors import UnsupportedError
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressedTensors"]


class CompressedTensors(ExportTarget):
    """`quant_method: compressed-tensors`, format `pack-quantized`."""

    name: ClassVar[str] = layout.NAME
    loading: ClassVar[
        str
    ] = """Loads in vLLM, and in transformers with the package `compressed-tensors` (0.18 or later).

```console
$ vllm serve DIR
```

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="float16")
```

Scales are float16; in `bfloat16` an engine rounds them to 8 bits of precision."""

    def check(self, source: Packable) -> None:
        refuse_extra_computation(source, self.name)
        if source.family.conv1d:
            raise UnsupportedError(
                f"{source.family.model_type} has no nn.Linear layers, the only ones that {self.name} packs",
                hint="pack it as qcli or dense",
            )
        refuse_mixed_fusions(source.linears(), affine_formats(source, self.name), self.name)

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
            layers, source.family.blocks, {layer.name: formats.get(layer.name) for layer in layers}
        )
        write_json(folder / "config.json", dense_config(source) | {"quantization_config": quantization})
        source.copy_companions(folder)

    def notes(self, source: NativeSource) -> dict[str, str]:
        formats = affine_formats(source, self.name)
        notes = {"vLLM": _vllm_rules.describe(source, formats)}
        if not layout.transformers_reads(formats.values()):
            notes["transformers"] = "refuses it: asymmetric layers beside others"
        return notes

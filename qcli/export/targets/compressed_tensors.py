"""compressed-tensors: vLLM, SGLang and transformers load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcli.core.formats.affine import Affine
from qcli.core.formats.fp8 import FP8
from qcli.core.formats.nvfp4 import DIVISOR, NVFP4, with_divisor
from qcli.core.weight import Format, QuantizedWeight
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
from qcli.export.targets._affine import affine_format, refuse_conv1d, refuse_mixed_fusions, with_format
from qcli.models.families import Family, fused
from qcli.models.layouts import compressed_tensors as layout
from qcli.models.native import NativeSource
from qcli.utils.errors import UnsupportedError
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompressedTensors"]


_VLLM, _TRANSFORMERS = "vLLM", "transformers"
_HALF = "float16"
_LOADING = {
    _VLLM: """Loads in vLLM, by its rules.

```console
$ vllm serve DIR
```""",
    _TRANSFORMERS: f"""Loads in transformers with the package `compressed-tensors` (0.18 or later).

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="{_HALF}")
```""",
}


class CompressedTensors(ExportTarget):
    """`quant_method: compressed-tensors`: uniform grids, fp8 and nvfp4, each layer in its own format."""

    name: ClassVar[str] = layout.NAME
    loading: ClassVar[str] = "\n\n".join(_LOADING.values())

    def check(self, source: Packable) -> None:
        if not _is_fp8_dynamic(source):
            refuse_extra_computation(source, self.name)
        refuse_vocabulary(source, self.name)
        refuse_conv1d(source, self.name)
        refuse_mixed_fusions(source.linears(), _formats(source), self.name)
        _shared_divisors(source)

    def refusals(self, source: Packable) -> dict[str, Refusal]:
        formats = _formats(source)
        refusals = {
            _VLLM: _vllm_rules.refusal(source, formats),
            _TRANSFORMERS: _transformers_refusal(formats, source.family),
        }
        return {engine: refusal for engine, refusal in refusals.items() if refusal is not None}

    def proven_with(self, source: Packable) -> Sequence[str] | str:
        refusal = self.refusals(source).get(_TRANSFORMERS)
        return ["transformers", "compressed-tensors"] if refusal is None else "transformers does not load it"

    def loading_of(self, source: Packable) -> str:
        refused = self.refusals(source)
        # Scales of fp8 are bfloat16 and may be beyond float16's range; those of grids are float16.
        grids = all(isinstance(format, Affine) for format in _formats(source).values())
        texts = {engine: text if grids else text.replace(_HALF, "bfloat16") for engine, text in _LOADING.items()}
        loading = [text for engine, text in texts.items() if engine not in refused]
        if refused:
            loading.append(f"Does not load in {' and '.join(refused)}, for the reason in the table above.")
        loading.append(
            "Scales of uniform grids are float16; in `bfloat16` an engine rounds them to 8 bits of precision. Those of "
            "fp8 and nvfp4 are exact in it."
        )
        return "\n\n".join(loading)

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        formats, divisors = _formats(source), _shared_divisors(source)

        def packed(name: str) -> dict[str, Tensor]:
            layer = name.removesuffix(".weight")
            if layer not in formats:
                return source.read([name])
            weight, format = source.read_quantized(layer), formats[layer]
            if isinstance(format, Affine):
                weight = with_format(weight, format)
            elif layer in divisors:
                weight = _with_divisor(layer, weight, divisors[layer])
            return layout.tensors(layer, weight)

        write_layers(source, folder, shard_size, progress, packed)
        layers = source.linears()
        by_name = {layer.name: formats.get(layer.name) for layer in layers}
        quantization = layout.quantization_config(layers, source.family, by_name, fp8_inputs=_is_fp8_dynamic(source))
        write_json(folder / "config.json", dense_config(source) | {"quantization_config": quantization})
        source.copy_companions(folder)

    def notes(self, source: Packable) -> dict[str, str]:
        refused = {engine: f"does not load it: {why.reason}" for engine, why in self.refusals(source).items()}
        return {_VLLM: _vllm_rules.describe(source, _formats(source))} | refused


def _is_fp8_dynamic(source: Packable) -> bool:
    """Whether weights and inputs of all quantized layers are fp8: the one quantization of inputs that engines share."""
    of_floats = source.activations is not None and source.activations.type == "float"
    return of_floats and all(isinstance(format, FP8) for format in source.formats().values())


def _formats(source: Packable) -> dict[str, layout.Storable]:
    """The format in which each quantized layer is stored, by name.

    Raises:
        UnsupportedError: a layer of a format that the layout does not have.
    """
    return {layer: _format(source, layer, storage.format) for layer, storage in source.quantized.items()}


def _format(source: Packable, layer: str, format: Format) -> layout.Storable:
    if isinstance(format, FP8 | NVFP4):
        return format
    if not isinstance(format, Affine):
        raise UnsupportedError(
            f"{layer} is {format.name}, {layout.NAME} stores only uniform grids, fp8 and nvfp4",
            hint="pack it as qcli or dense",
        )
    return affine_format(source, layer, layout.NAME)


def _shared_divisors(source: Packable) -> dict[str, Tensor]:
    """The divisor of each nvfp4 layer that engines fuse with others: they compute all of them with one.

    Raises:
        UnsupportedError: a layer has scales that are too small for it.
    """
    divisors: dict[str, Tensor] = {}
    for layers in fused(source.linears()):
        names = [each.name for each in layers if isinstance(source.formats().get(each.name), NVFP4)]
        weights = {name: source.read_quantized(name) for name in names}
        if len(weights) > 1:
            least = min((weight.tables[DIVISOR] for weight in weights.values()), key=float)
            divisors |= dict.fromkeys(weights, least)
            for name, weight in weights.items():
                _with_divisor(name, weight, least)
    return divisors


def _with_divisor(layer: str, weight: QuantizedWeight, divisor: Tensor) -> QuantizedWeight:
    moved = with_divisor(weight, divisor)
    if moved is None:
        raise UnsupportedError(
            f"{layer} has scales that are too small beside those of the layers that engines fuse it with",
            hint="pack it as qcli or dense, or leave these layers dense by an override",
        )
    return moved


def _transformers_refusal(formats: Mapping[str, layout.Storable], family: Family) -> Refusal | None:
    if layout.transformers_reads(formats.values(), family):
        return None
    if family.own_linear:
        return Refusal(f"layers of several formats in a {family.model_type} model", ("one format for all layers",))
    if any(isinstance(format, NVFP4) for format in formats.values()):
        return Refusal("nvfp4 beside layers of another format", ("one format for all layers",))
    return Refusal("asymmetric layers beside layers of another format", ("--symmetric",))

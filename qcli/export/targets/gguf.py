"""GGUF: one file that llama.cpp and programs based on it load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from qcli.core.formats.affine import Affine
from qcli.export.gguf.types import BLOCK, REQUANTIZE_TYPES, BlockType
from qcli.export.target import ExportTarget, Packable, dense_config, refuse_extra_computation
from qcli.models.gguf import GGUFSource
from qcli.models.manifest import Manifest
from qcli.models.native import NativeSource
from qcli.models.open import PACKED_GGUF, ModelSource
from qcli.utils.dtypes import WEIGHT_DTYPES, torch_dtype
from qcli.utils.errors import UnsupportedError
from qcli.utils.files import write_json, writing
from qcli.utils.progress import Progress
from qcli.utils.trust import Trust

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GGUF"]

_NORM_ROUNDING = 1e-6  # of norms that are stored with the family's offset added, in float32


class _Entry(NamedTuple):
    """A tensor of the file: its type, name and shape there, and its name in the dense model."""

    type: str
    name: str
    shape: tuple[int, ...]
    original: str


class GGUF(ExportTarget):
    """A `.gguf` file, with config and tokenizer beside it for other readers.

    A quantized layer, embedding or head is stored in the smallest block type that represents it exactly, a dense matrix
    in its own dtype, a vector in float32.
    """

    name: ClassVar[str] = "gguf"
    hub_library: ClassVar[str] = "gguf"
    requantize_types: ClassVar[tuple[str, ...]] = tuple(REQUANTIZE_TYPES)
    loading: ClassVar[str] = f"""Loads in llama.cpp and programs based on it.

```console
$ llama-cli -m DIR/{PACKED_GGUF}
```"""

    def __init__(self, requantize: str | None = None) -> None:
        super().__init__(requantize)
        self._types: dict[str, BlockType | None] = {}
        self._shifts_norms = False

    def check(self, source: Packable) -> None:
        try:
            import gguf
        except ImportError:
            raise UnsupportedError(
                "--format gguf needs the package gguf", hint="install it: pip install gguf"
            ) from None
        from qcli.export.gguf import blocks, metadata, vocabulary

        refuse_extra_computation(source, self.name)
        self._shifts_norms = source.family.norm_offset != 0
        config = source.hf_config()
        known = metadata.architecture(config)
        vocabulary.write(gguf.GGUFWriter(None, known.name), source.tokenizer(), config.vocab_size)
        for layer in (*source.quantized, *source.vocabulary):
            self._types[layer] = blocks.exact_type(source.read_quantized(layer))
            if self._types[layer] is None:
                self._require_roundable(source, layer)
        list(self._entries(source, known.name))  # raises where a tensor has no name in llama.cpp

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        """Write a single file whatever `shard_size` is: llama.cpp maps it into memory."""
        with writing(folder / PACKED_GGUF):
            self._write(source, folder / PACKED_GGUF, progress)
        write_json(folder / "config.json", dense_config(source))
        source.copy_companions(folder)

    def proven_with(self, source: Packable) -> Sequence[str] | str:
        return "llama.cpp; its files were read back with the package gguf and transformers' converters"

    def open(self, folder: Path, trust: Trust) -> ModelSource:
        return GGUFSource(folder / PACKED_GGUF, beside=folder, trust_remote_code=trust.remote_code)

    def tolerance(self, name: str, tensor: Tensor) -> float:
        layer = name.removesuffix(".weight")
        if self.requantize is not None and layer in self._types and self._types[layer] is None:
            return REQUANTIZE_TYPES[self.requantize].rounding * float(tensor.abs().max())
        return _NORM_ROUNDING if self._shifts_norms and name.endswith("norm.weight") else 0.0

    def rounded(self) -> list[str]:
        return [layer for layer, type in self._types.items() if type is None]

    def notes(self, source: Packable) -> dict[str, str]:
        rounded = len(self.rounded())
        types = Counter(type.name for type in self._types.values() if type is not None)
        exact = ", ".join(f"{count} layers {name}" for name, count in types.most_common())
        return {"exact": exact or "none"} | ({"rounded": f"{rounded} layers to {self.requantize}"} if rounded else {})

    def _require_roundable(self, source: Packable, layer: str) -> None:
        """Refuse a layer that no block type stores exactly, unless it can be requantized as requested."""
        storage = source.quantized[layer] if layer in source.quantized else source.vocabulary[layer]
        format, columns = storage.format, storage.shape[1]
        if self.requantize is None:
            grid = isinstance(format, Affine)
            raise UnsupportedError(
                f"{layer} ({format.bits} bits, {format.name}) fits none of gguf's types exactly",
                hint=("quantize in groups that are multiples of 32 with integer zero points, " if grid else "")
                + "pack it as qcli or dense, or round it: --requantize Q8_0",
            )
        if isinstance(REQUANTIZE_TYPES[self.requantize], BlockType) and columns % BLOCK:
            raise UnsupportedError(
                f"{layer} has {columns} inputs, which {self.requantize} cannot divide into blocks of {BLOCK}",
                hint="--requantize F16 takes any number of inputs",
            )

    def _write(self, source: NativeSource, file: Path, progress: Progress) -> None:
        import gguf

        from qcli.export.gguf import metadata, vocabulary

        config = source.hf_config()
        known = metadata.architecture(config)
        model = Manifest.read(source.path).source.model
        writer: Any = gguf.GGUFWriter(file, known.name)
        entries = list(self._entries(source, known.name))
        metadata.write(writer, config, Path(model).name)
        vocabulary.write(writer, source.tokenizer(), config.vocab_size)
        writer.add_file_type(_file_type(entries))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        factors = metadata.rope_factors(config)
        if factors is not None:
            _index(writer, _Entry("F32", "rope_freqs.weight", tuple(factors.shape), ""))
        for entry in entries:
            _index(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for number, entry in enumerate(entries):
            progress("write", number, len(entries))
            tensor = self._encoded(source, entry)
            if known.permuted and entry.name.split(".")[-2] in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if ".attn_q." in entry.name else config.num_key_value_heads
                tensor = _interleaved(tensor, heads)
            writer.write_tensor_data(tensor.numpy())
        writer.close()
        progress("write", len(entries), len(entries))

    def _entries(self, source: Packable, architecture: str) -> Iterator[_Entry]:
        """Every tensor with its name in llama.cpp.

        Raises:
            UnsupportedError: llama.cpp has none for it.
        """
        import gguf

        names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(names[architecture], source.hf_config().num_hidden_layers)
        for original, stored in source.tensors().items():
            name = table.get_name(original, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UnsupportedError(
                    f"gguf: llama.cpp's {architecture} has no tensor for {original}", hint="pack it as qcli or dense"
                )
            layer = original.removesuffix(".weight")
            if layer in self._types:
                block = self._types[layer]
                kind = str(self.requantize) if block is None else block.name
            else:
                kind = "F32" if len(stored.shape) == 1 else stored.dtype
            yield _Entry(kind, name, stored.shape, original)

    def _encoded(self, source: NativeSource, entry: _Entry) -> Tensor:
        """The tensor as the file stores it: uint8 of its bytes, or float32."""
        import torch

        from qcli.export.gguf import blocks

        layer = entry.original.removesuffix(".weight")
        if (block := self._types.get(layer)) is not None:
            return blocks.encode(source.read_quantized(layer), block)
        tensor = source.read([entry.original])[entry.original]
        if self._shifts_norms and entry.original.endswith("norm.weight"):
            tensor = tensor.float() + source.family.norm_offset
        if entry.type in WEIGHT_DTYPES:
            tensor = tensor.to(torch_dtype(entry.type)).contiguous()
            return tensor if entry.type == "F32" else tensor.view(torch.uint8)
        import gguf
        from gguf.quants import quantize

        return torch.from_numpy(quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[entry.type]))


def _index(writer: Any, entry: _Entry) -> None:
    """Add a tensor, to be written later, to the file's index."""
    import gguf
    import numpy as np

    type = gguf.GGMLQuantizationType[entry.type]
    if entry.type == "F32":
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), 4 * prod(entry.shape))
        return
    shape = gguf.quant_shape_to_byte_shape(entry.shape, type)
    writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=type)


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order: those of the two halves of a head alternate."""
    halves: Tensor = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def _file_type(entries: list[_Entry]) -> int:
    """GGUF's `general.file_type`, by the type of most matrices."""
    import gguf

    most = Counter(entry.type for entry in entries if len(entry.shape) > 1).most_common(1)[0][0]
    return int(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])

"""GGUF: one file that llama.cpp and programs based on it load."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

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

    from qcli.models.quantized import LayerStorage

__all__ = ["GGUF"]

_NORM_ROUNDING = 1e-6  # of norms that are stored with the family's offset added, in float32


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+\.(?:weight|bias))")
_ROUTERS = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # whose choices hang on small differences


class Readable(Packable, Protocol):
    """A checkpoint whose tensors can be read, or a model that is not quantized."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...


class _Entry(NamedTuple):
    """A tensor of the file: its type, name and shape there, and what it is in the dense model: a tensor, or one of each
    expert in their order."""

    type: str
    name: str
    shape: tuple[int, ...]
    originals: tuple[str, ...]


class GGUF(ExportTarget):
    """A `.gguf` file, with config and tokenizer beside it for other readers.

    A quantized layer, embedding or head is stored in the smallest block type that represents it exactly, a dense matrix
    in its own dtype, a vector or a router in float32. The same layer of all experts of a block is one tensor, of one
    type.
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
        self._named: dict[str, tuple[str, ...]] = {}
        self._shifts_norms = False

    def check(self, source: Packable) -> None:
        try:
            import gguf
        except ImportError:
            raise UnsupportedError(
                "--format gguf needs the package gguf", hint="install it: pip install gguf"
            ) from None
        from qcli.export.gguf import metadata, vocabulary

        refuse_extra_computation(source, self.name)
        self._shifts_norms = source.family.norm_offset != 0
        config = source.hf_config()
        known = metadata.architecture(config)
        vocabulary.write(gguf.GGUFWriter(None, known.name), source.tokenizer(), config.vocab_size)
        self._named = _named(source, known.name)
        for originals in self._named.values():
            layers = [original.removesuffix(".weight") for original in originals]
            if any(layer in source.quantized or layer in source.vocabulary for layer in layers):
                self._types |= dict.fromkeys(layers, _exact_type(source, layers))
        computed = [layer for layer in (*source.quantized, *source.vocabulary) if layer in self._types]
        self._types = {layer: self._types[layer] for layer in computed} | self._types  # messages name the first
        if self.rounded():
            self._require_roundable(source)

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        """Write a single file whatever `shard_size` is: llama.cpp maps it into memory."""
        self.write_file(source, folder / PACKED_GGUF, Manifest.read(source.path).source.model, progress)
        write_json(folder / "config.json", dense_config(source))
        source.copy_companions(folder)

    def write_file(self, source: Readable, file: Path, model: str, progress: Progress) -> None:
        """Write the file alone.

        Args:
            source: as `check` has accepted it.
            model: name or path of the original.
        """
        with writing(file):
            self._write(source, file, model, progress)

    @property
    def named(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the file's tensors, each with the tensors of the dense model that it stands for; after `check`."""
        return self._named

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

    def _require_roundable(self, source: Packable) -> None:
        """Refuse layers that no block type stores exactly, unless they can be requantized as requested."""
        shapes, rounded = source.tensors(), self.rounded()
        odd = {layer: inputs for layer in rounded if (inputs := shapes[f"{layer}.weight"].shape[1]) % BLOCK}
        if self.requantize is None:
            fitting = _fitting_flags(source, rounded)
            raise UnsupportedError(
                _unfitting(source, rounded),
                hint=(f"quantize with {' '.join(fitting)}, " if fitting else "")
                + f"pack it as qcli or dense, or round it: --requantize {'F16' if odd else 'Q8_0'}",
            )
        if odd and isinstance(REQUANTIZE_TYPES[self.requantize], BlockType):
            layer, inputs = next(iter(odd.items()))
            raise UnsupportedError(
                f"{layer} has {inputs} inputs, which {self.requantize} cannot divide into blocks of {BLOCK}",
                hint="--requantize F16 takes any number of inputs",
            )

    def _write(self, source: Readable, file: Path, model: str, progress: Progress) -> None:
        import gguf

        from qcli.export.gguf import metadata, vocabulary

        config = source.hf_config()
        known = metadata.architecture(config)
        writer: Any = gguf.GGUFWriter(file, known.name)
        entries = list(self._entries(source))
        metadata.write(writer, config, Path(model).name)
        vocabulary.write(writer, source.tokenizer(), config.vocab_size)
        writer.add_file_type(_file_type(entries))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        factors = metadata.rope_factors(config)
        if factors is not None:
            _index(writer, _Entry("F32", "rope_freqs.weight", tuple(factors.shape), ()))
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

    def _entries(self, source: Packable) -> Iterator[_Entry]:
        """Every tensor of the file."""
        tensors = source.tensors()
        for name, originals in self._named.items():
            stored = tensors[originals[0]]
            shape = stored.shape[1:] if len(stored.shape) > 1 and stored.shape[0] == 1 else stored.shape
            layer = originals[0].removesuffix(".weight")
            if layer in self._types:
                block = self._types[layer]
                kind = str(self.requantize) if block is None else block.name
            else:
                kind = "F32" if len(shape) == 1 or name.endswith(_ROUTERS) else stored.dtype
            yield _Entry(kind, name, shape if len(originals) == 1 else (len(originals), *shape), originals)

    def _encoded(self, source: Readable, entry: _Entry) -> Tensor:
        """The tensor as the file stores it: uint8 of its bytes, or float32."""
        import torch

        return torch.cat([self._encoded_one(source, original, entry.type) for original in entry.originals])

    def _encoded_one(self, source: Readable, original: str, type: str) -> Tensor:
        import torch

        from qcli.export.gguf import blocks

        if (block := self._types.get(original.removesuffix(".weight"))) is not None:
            return blocks.encode(source.read_quantized(original.removesuffix(".weight")), block)
        tensor = source.read([original])[original]
        if self._shifts_norms and original.endswith("norm.weight"):
            tensor = tensor.float() + source.family.norm_offset
        if type in WEIGHT_DTYPES:
            tensor = tensor.to(torch_dtype(type)).contiguous()
            return tensor if type == "F32" else tensor.view(torch.uint8)
        import gguf
        from gguf.quants import quantize

        return torch.from_numpy(quantize(tensor.float().numpy(), gguf.GGMLQuantizationType[type]))


def _named(source: Packable, architecture: str) -> dict[str, tuple[str, ...]]:
    """The names in llama.cpp of all tensors of the dense model, each with the tensors that it stands for.

    Raises:
        UnsupportedError: llama.cpp has none for a tensor, or the package gguf is too old to know.
    """
    import gguf

    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in names:
        raise UnsupportedError(
            f"gguf: the installed package gguf does not know llama.cpp's {architecture}", hint="pip install -U gguf"
        )
    table = gguf.get_tensor_name_map(names[architecture], source.hf_config().num_hidden_layers)
    named: dict[str, dict[int, str]] = {}
    for original in source.tensors():
        of_expert = _EXPERT.fullmatch(original)
        merged = original if of_expert is None else f"{of_expert[1]}.{of_expert[3]}"
        merged = merged.replace("e_score_correction_bias", "e_score_correction.bias")
        name = table.get_name(merged, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedError(
                f"gguf: llama.cpp's {architecture} has no tensor for {original}", hint="pack it as qcli or dense"
            )
        named.setdefault(name, {})[0 if of_expert is None else int(of_expert[2])] = original
    return {name: tuple(experts[number] for number in sorted(experts)) for name, experts in named.items()}


def _exact_type(source: Packable, layers: list[str]) -> BlockType | None:
    """The smallest block type that stores all of these layers exactly; None: there is none, or one of them is dense."""
    from qcli.export.gguf import blocks

    if not all(layer in source.quantized or layer in source.vocabulary for layer in layers):
        return None
    first, *others = layers
    types = blocks.exact_types(source.read_quantized(first))
    return next((type for type in types if all(blocks.holds(type, source.read_quantized(o)) for o in others)), None)


def _unfitting(source: Packable, layers: list[str]) -> str:
    """Why no block type stores these layers exactly, by one of them."""
    dense = next((layer for layer in layers if _storage(source, layer) is None), None)
    storage = _storage(source, layers[0])
    if dense is not None or storage is None:
        return f"{dense} is dense, other experts of its block are not: one tensor of gguf does not hold both exactly"
    beside = ", in one tensor with the block's other experts," if _EXPERT.fullmatch(f"{layers[0]}.weight") else ""
    return f"{layers[0]} ({storage.format.bits} bits, {storage.format.name}){beside} fits none of gguf's types exactly"


def _fitting_flags(source: Packable, layers: list[str]) -> list[str]:
    """Flags of `qcli quantize` that make all of these layers fit; none where their format or their width does not."""
    flags: dict[str, None] = {}
    for layer in layers:
        storage = _storage(source, layer)
        if storage is None or not isinstance(format := storage.format, Affine) or storage.shape[1] % BLOCK:
            return []
        if format.groups(storage.shape[1]) > 1 and format.group_width(storage.shape[1]) % BLOCK:
            flags[f"--group-size {BLOCK}"] = None
        if format.bits == 8 and format.zero_point != "none":
            flags["--symmetric"] = None
        elif format.zero_point == "float":
            flags["--set method.zero_point=integer"] = None
    return list(flags)


def _storage(source: Packable, layer: str) -> LayerStorage | None:
    return source.quantized.get(layer) or source.vocabulary.get(layer)


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

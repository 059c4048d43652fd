"""A model in a GGUF file: tensors are dequantized one by one, when they are read.

transformers knows how GGUF's names and tensors map to its models, but its converter dequantizes the whole file. Here
its name map and its per-tensor processors are applied to single tensors. For config and tokenizer it parses the file
again each time, which takes seconds for a large vocabulary; in `_shared_reader` it uses a reader that parses three
times as fast.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qcli.models import families, gguf_config
from qcli.models.companions import code_files, companions
from qcli.models.experts import find_experts
from qcli.models.folder import read_config, read_hf_config
from qcli.models.pretrained import pretrained
from qcli.models.source import ModelSource, reported
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from qcli.models.names import Names


_OTHER_FILES = "use the model's safetensors folder"
_CORRECTION = "e_score_correction_bias"
_EMBEDDING = "token_embd.weight"
_TEMPLATE = "tokenizer.chat_template"
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_LONG = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
_PROCESSORS = {"gemma": "gemma2"}  # architectures that transformers has no processor for, by one that does the same


class _Entry(NamedTuple):
    """A tensor in a file: its GGUF name and type, where its bytes are, the array that they form, and its weights."""

    file: Path
    name: str
    type: Any
    start: int
    bytes: int
    dtype: Any
    shape: tuple[int, ...]
    weights: int


class GGUFSource(ModelSource):
    """A `.gguf` file, or several that llama.cpp has split a model into. Tensors are read as float32; sizes are those in
    the file.

    Args:
        path: the file; of a split model the first one, which has the metadata.
        beside: folder with the model's original config and tokenizer, which the file has only in part; None: no such
            folder, both are converted from the file.

    Raises:
        UsageError: the file is truncated or not GGUF.
        UnsupportedError: the package gguf is missing or cannot decode a tensor, or transformers cannot convert the
            file.
    """

    dense_dtype = "BF16"

    def __init__(self, path: Path, *, beside: Path | None = None, trust_remote_code: bool = False) -> None:
        self._beside, self.trust_remote_code = beside, trust_remote_code
        self._files = parts(path)
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise UnsupportedError(f"{path} needs the package gguf", hint="install it: pip install gguf") from None
        with reported(f"{path} is truncated or not a GGUF file", hint="download it again"):
            reader, *others = map(_parse, self._files)
            self._architecture = str(reader.fields["general.architecture"].contents())
        tensors = [
            (file, tensor) for file, part in zip(self._files, (reader, *others), strict=True) for tensor in part.tensors
        ]
        self._require_all(reader, len(tensors))
        self._in_file = [
            _Entry(
                file,
                tensor.name,
                tensor.tensor_type,
                int(tensor.data_offset),
                int(tensor.n_bytes),
                tensor.data.dtype,
                tuple(tensor.data.shape),
                int(tensor.n_elements),
            )
            for file, tensor in tensors
            if tensor.name not in gguf_config.FACTORS
        ]
        self._require_blocks(path, reader)
        self._require_types(path)
        factors = {
            tensor.name: tensor.data.astype("float32").tolist()
            for _, tensor in tensors
            if tensor.name in gguf_config.FACTORS
        }
        with _shared_reader(reader):
            self._config = self._converted_config(path, reader, factors)
        super().__init__(path, _raw(self._config), trust_remote_code=trust_remote_code)
        self._stored, self._entries = self._mapped()

    def _require_all(self, reader: Any, count: int) -> None:
        """Refuse a split model whose files are not as many, or do not have as many tensors, as the first one says."""
        for key, actual in (("split.count", len(self._files)), ("split.tensors.count", count)):
            said = reader.fields[key].contents() if key in reader.fields else actual
            if said != actual:
                raise UsageError(
                    f"{self._files[0]}: its metadata say {key} {said!r}, there are {actual}",
                    hint="give the first of all its files; download them again if one is missing",
                )

    def _require_blocks(self, path: Path, reader: Any) -> None:
        """Refuse a number of blocks that the file does not have: transformers would build as many, however long."""
        field = reader.fields.get(f"{self._architecture}.block_count")
        if self._beside is not None:
            count: Any = families.block_count(read_config(self._beside))
        else:
            count = None if field is None else field.contents()
        blocks = {entry.name.split(".")[1] for entry in self._in_file if entry.name.startswith("blk.")}
        if count is not None and not (isinstance(count, int) and count <= len(blocks)):
            raise UsageError(
                f"{path} has {len(blocks)} blocks, its metadata say {count!r}",
                hint="the file is damaged: download it again",
            )

    def _require_types(self, path: Path) -> None:
        """Refuse types that the package gguf knows by name and cannot decode, such as Q8_1."""
        import numpy as np
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        for type, name in {entry.type: entry.name for entry in reversed(self._in_file)}.items():
            _, bytes = GGML_QUANT_SIZES[type]
            try:
                dequantize(np.zeros((1, bytes), np.uint8), type)
            except NotImplementedError:
                raise UnsupportedError(
                    f"{path}: {name} is stored as {type.name}, which the package gguf cannot decode",
                    hint="convert the model to another type, such as Q8_0",
                ) from None

    @cached_property
    def family(self) -> families.Family:
        if families.has_row(self.config):
            return families.family(self.config)
        from qcli.models.discovery import discovered_family

        return discovered_family(self)

    def tensors(self) -> dict[str, StoredTensor]:
        return dict(self._stored)

    def hf_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self._config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @property
    def tokenizer_path(self) -> Path:
        return self.path if self._beside is None else self._beside

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        trust = self.trust_remote_code
        with reported(f"{self.path} has no usable tokenizer"):
            if self._beside is not None:
                beside: PreTrainedTokenizerBase = pretrained(AutoTokenizer, self._beside, trust_remote_code=trust)
                return beside
            with _shared_reader(_parse(self.path)):
                tokenizer: PreTrainedTokenizerBase = pretrained(
                    AutoTokenizer, self.path.parent, trust_remote_code=trust, gguf_file=self.path.name
                )
        if named := self._named_templates():
            default = {} if tokenizer.chat_template is None else {"default": tokenizer.chat_template}
            tokenizer.chat_template = {**default, **named}
        return tokenizer

    def _named_templates(self) -> dict[str, str]:
        """Chat templates besides the default one, which transformers reads."""
        prefix = f"{_TEMPLATE}."
        return {k.removeprefix(prefix): str(v) for k, v in self._settings.items() if k.startswith(prefix)}

    def companions(self) -> Mapping[str, Path | bytes]:
        return {} if self._beside is None else companions(self._beside, trusted=self.trust_remote_code)

    def code_files(self) -> Mapping[str, Path]:
        return code_files(self._beside) if self.trust_remote_code and self._beside is not None else {}

    def on_disk(self, name: str) -> str:
        return self._names.on_disk(name)

    def name_in_model(self, stored: str) -> str:
        return self._names.name_in_model(stored)

    @cached_property
    def _names(self) -> Names:
        from qcli.models.loadable import skeleton
        from qcli.models.names import Names

        return Names(skeleton(self._config, trust_remote_code=self.trust_remote_code))

    def copy_companions(self, out: Path) -> None:
        if self._beside is not None:
            super().copy_companions(out)
            return
        from transformers import GenerationConfig

        tokenizer = self.tokenizer()
        with reported(f"{self.path}: transformers cannot write what the file has of tokenizer and generation config"):
            tokenizer.save_pretrained(out)
            generation = GenerationConfig.from_model_config(self._config)
            if len(ends := gguf_config.end_tokens(self._settings)) > 1:
                generation.eos_token_id = ends
            generation.save_pretrained(out)

    def stored_as(self, name: str) -> str:
        return str(self._entries[name].type.name)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        import numpy as np
        import torch
        from gguf.quants import dequantize

        tensors = {}
        for name in names:
            if name not in self._entries:
                raise UsageError(f"{self.path} has no tensor {name}", hint="download it again")
            entry = self._entries[name]
            data = np.fromfile(entry.file, entry.dtype, prod(entry.shape), offset=entry.start)
            weights = dequantize(data.reshape(entry.shape), entry.type)
            weights = self._processor.process(weights, entry.name, parsed_parameters={"tensors": {}}).weights
            weights = np.ascontiguousarray(weights, dtype=np.float32)
            tensors[name] = torch.from_numpy(weights).view(self._stored[name].shape)
        return tensors

    def stored_bytes(self, name: str) -> int:
        return self._entries[name].bytes

    def weight_files(self) -> list[Path]:
        return list(self._files)

    def _converted_config(self, path: Path, reader: Any, factors: dict[str, list[float]]) -> PreTrainedConfig:
        from transformers import AutoConfig

        trust = self.trust_remote_code
        if self._beside is not None:
            return read_hf_config(self._beside, trust_remote_code=trust)
        place = f"{path}: transformers cannot read this {self._architecture} file"
        with reported(place, UnsupportedError, hint=_OTHER_FILES):
            config: PreTrainedConfig = pretrained(AutoConfig, path.parent, trust_remote_code=trust, gguf_file=path.name)
        if config.model_type not in gguf_config.MIXTURES:
            families.family(_raw(config))  # an unsupported model is told before a setting of it
        embedding = next((entry for entry in self._in_file if entry.name == _EMBEDDING), None)
        if embedding is None:
            raise UsageError(f"{path} has no tensor {_EMBEDDING}", hint="download it again")
        try:
            with reported("its settings cannot be read", UnsupportedError, hint=_OTHER_FILES):
                self._settings = {key: field.contents() for key, field in reader.fields.items() if key not in _LONG}
                return gguf_config.complete(config, self._settings, factors, embedding.shape[0])
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error.message}", hint=error.hint) from None

    def _names_in_model(self, model: PreTrainedModel) -> dict[str, str]:
        """The name in the causal LM of every tensor of the file, but of experts.

        transformers' map takes time quadratic in depth, so it is made for one block of each kind; others are named
        alike. It has no correction of experts' scores.
        """
        from torch import nn
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        path = self.family.blocks
        first, like = _alike(model.get_submodule(path).children())
        model.set_submodule(path, nn.ModuleList(first))
        mapped = get_gguf_hf_weights_map(model, self._processor, self._architecture)
        for name in model.state_dict():
            if name.startswith(f"{path}.") and name.endswith(_CORRECTION):
                mapped[f"blk.{name.removeprefix(f'{path}.').split('.')[0]}.exp_probs_b.bias"] = name
        names = {in_file: name for in_file, name in mapped.items() if not in_file.startswith("blk.")}
        for index, kind in enumerate(like):
            for in_file, name in mapped.items():
                if in_file.startswith(f"blk.{kind}."):
                    own = in_file.replace(f"blk.{kind}.", f"blk.{index}.", 1)
                    names[own] = name.replace(f"{path}.{kind}.", f"{path}.{index}.", 1)
        return names

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        processor: Any = TENSOR_PROCESSORS.get(_PROCESSORS.get(self._architecture, self._architecture), TensorProcessor)
        return processor(config=self._config.to_dict())

    def _mapped(self) -> tuple[dict[str, StoredTensor], dict[str, _Entry]]:
        """Dtypes and shapes of the file's tensors, and where they are, by their names in the causal LM."""
        from qcli.models.loadable import skeleton

        with reported(f"{self.path}: transformers cannot build this model", UnsupportedError, hint=_OTHER_FILES):
            model = skeleton(self._config, trust_remote_code=self.trust_remote_code)
        self.config["architectures"] = [type(model).__name__]
        self.config["dtype"] = "bfloat16"
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        stacks: dict[str, list[str]] = {}  # the experts' own tensors, by that of all experts
        for experts in find_experts(model):
            block = experts.path.removeprefix(f"{self.family.blocks}.").split(".")[0]
            for name, _ in experts.pieces():
                _, projection, part = name.rsplit(".", 2)
                in_file = f"blk.{block}.ffn_{projection.removesuffix('_proj')}_exps.{part}"
                stacks.setdefault(in_file, []).append(name)
                rows, columns = experts.sizes[projection]
                shapes[name] = (rows, columns) if part == "weight" else (rows,)
        names = self._names_in_model(model)
        entries: dict[str, _Entry] = {}
        unmapped = []
        for entry in self._in_file:
            if entry.name in stacks:
                entries |= zip(stacks[entry.name], _apart(entry, len(stacks[entry.name])), strict=True)
            elif entry.name in names:
                entries[names[entry.name]] = entry
            else:
                unmapped.append(entry.name)
        if unmapped:
            raise UnsupportedError(
                f"{self.path}: transformers does not know the tensors {', '.join(unmapped[:3])} and would drop them",
                hint=_OTHER_FILES,
            )
        for name, entry in entries.items():
            if entry.weights != prod(shapes[name]):
                raise UsageError(
                    f"{self.path}: {entry.name} has {entry.weights} weights, its metadata say {list(shapes[name])}",
                    hint="the file is damaged: download it again",
                )
        return {name: StoredTensor("F32", shapes[name]) for name in entries}, entries


def _alike(blocks: Iterable[nn.Module]) -> tuple[list[nn.Module], list[int]]:
    """One block for each set of tensors that blocks have; and for every block, which of these it is like."""
    found: dict[tuple[str, ...], int] = {}
    first: list[nn.Module] = []
    like: list[int] = []
    for block in blocks:
        kind = tuple(block.state_dict())
        if kind not in found:
            found[kind] = len(first)
            first.append(block)
        like.append(found[kind])
    return first, like


def _apart(entry: _Entry, count: int) -> list[_Entry]:
    """The tensors of single experts in that of all, `[experts, ...]`.

    Raises:
        UsageError: it is of another number of experts.
    """
    if len(entry.shape) < 2 or entry.shape[0] != count:
        raise UsageError(f"{entry.file}: {entry.name} is not of {count} experts", hint="download it again")
    bytes, shape, weights = entry.bytes // count, entry.shape[1:], entry.weights // count
    return [
        entry._replace(start=entry.start + number * bytes, bytes=bytes, shape=shape, weights=weights)
        for number in range(count)
    ]


def parts(path: Path) -> list[Path]:
    """All files of a split model, in order, from the name of one of them; of any other model, its file.

    Raises:
        UsageError: one is missing.
    """
    files = [path.parent / name for name in part_names(path.name)]
    if files == [path]:
        return files
    missing = [file.name for file in files if not file.is_file()]
    if missing or path not in files:
        raise UsageError(
            f"{path.parent} has no {', '.join(missing[:3]) or files[0].name}, a part of {path.name}",
            hint="download all files of the model into one folder",
        )
    return files


def part_names(name: str) -> list[str]:
    """The names of all files of a split model, in order, from one of them; of any other model, its name."""
    named = _SPLIT.fullmatch(name)
    if named is None:
        return [name]
    stem, _, count = named.groups()
    return [f"{stem}-{number:05d}-of-{count}.gguf" for number in range(1, int(count) + 1)]


def is_later_part(file: Path) -> bool:
    """Whether a file is a part of a split model, but not the first, which stands for all."""
    return file.name != part_names(file.name)[0]


def _parse(path: Path) -> Any:
    """A GGUFReader on a plain array: on a memory map, slicing a hundred thousand strings takes three times as long."""
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Reader(path)


@contextmanager
def _shared_reader(reader: Any) -> Iterator[None]:
    """Within: whoever creates a GGUFReader, as transformers does at every call, gets this one."""
    gguf: Any = import_module("gguf")
    original = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: reader
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _raw(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as `config.json` would have it."""
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    for key in ("transformers_version", "_model_name_or_path"):
        raw.pop(key, None)
    return raw

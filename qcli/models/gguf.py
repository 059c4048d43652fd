"""A model in a GGUF file: tensors are dequantized one by one, when they are asked for.

transformers knows how GGUF names and layouts map to its models; its converter, however, dequantizes the whole
file. Here its name map and its per-tensor processors are applied to single tensors. For config and tokenizer it parses
the file anew each time, which takes seconds for a large vocabulary: it is lent a parse that takes a third of that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qcli.models.source import ModelSource, first_line
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


_ROPE_FACTORS = "rope_freqs.weight"  # follow from the config


class _Entry(NamedTuple):
    """A tensor in the file: its GGUF name and type, where its bytes are, and how numpy sees them."""

    name: str
    type: Any
    start: int
    bytes: int
    dtype: Any
    shape: tuple[int, ...]


class GGUFSource(ModelSource):
    """A `.gguf` file. Tensors are float32, whatever it stores; bits and bytes are those it stores.

    Args:
        beside: a folder with the model's own config and tokenizer, of which the file tells less; None: there is none.
    """

    dense_dtype = "BF16"

    def __init__(self, path: Path, *, beside: Path | None = None, trust_remote_code: bool = False) -> None:
        self._beside = beside
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise UnsupportedError(f"{path} needs the package gguf", hint="install it: pip install gguf") from None
        try:
            reader = _parse(path)
            self._architecture = str(reader.fields["general.architecture"].contents())
        except Exception as error:  # the reader fails in as many ways as a file can be damaged
            raise UsageError(
                f"{path} is truncated or no GGUF file: {first_line(error)}", hint="download it again"
            ) from error
        self._in_file = [
            _Entry(
                tensor.name,
                tensor.tensor_type,
                int(tensor.data_offset),
                int(tensor.n_bytes),
                tensor.data.dtype,
                tuple(tensor.data.shape),
            )
            for tensor in reader.tensors
            if beside is None or tensor.name != _ROPE_FACTORS
        ]
        with _lent(reader):
            self._config = self._converted_config(path)
        super().__init__(path, _raw(self._config), trust_remote_code=trust_remote_code)
        self._stored, self._entries = self._mapped()

    def tensors(self) -> dict[str, StoredTensor]:
        return dict(self._stored)

    def hf_config(self) -> PreTrainedConfig:
        return copy.deepcopy(self._config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        if self._beside is not None:
            beside: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self._beside, local_files_only=True)
            return beside
        try:
            with _lent(_parse(self.path)):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    self.path.parent, gguf_file=self.path.name
                )
        except Exception as error:  # the converter raises whatever a missing or odd field leads to
            raise UsageError(f"{self.path} has no usable tokenizer: {first_line(error)}") from error
        return tokenizer

    def copy_companions(self, out: Path) -> None:
        from transformers import GenerationConfig

        self.tokenizer().save_pretrained(out)
        GenerationConfig.from_model_config(self._config).save_pretrained(out)

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
            data = np.fromfile(self.path, entry.dtype, prod(entry.shape), offset=entry.start)
            weights = dequantize(data.reshape(entry.shape), entry.type)
            weights = self._processor.process(weights, entry.name, parsed_parameters={"tensors": {}}).weights
            weights = np.ascontiguousarray(weights, dtype=np.float32)
            tensors[name] = torch.from_numpy(weights).view(self._stored[name].shape)
        return tensors

    def _stored_bytes(self, name: str) -> int:
        return self._entries[name].bytes

    def weight_files(self) -> list[Path]:
        return [self.path]

    def _converted_config(self, path: Path) -> PreTrainedConfig:
        from transformers import AutoConfig

        if self._beside is not None:
            return _config_of(self._beside)
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # ValueError for unknown architectures, anything for missing fields
            raise UnsupportedError(
                f"{path}: transformers cannot read this {self._architecture} file: {first_line(error)}",
                hint="use the model's safetensors folder",
            ) from error
        return config

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        processed_as = {"gemma": "gemma2"}.get(self._architecture, self._architecture)
        processor: Any = TENSOR_PROCESSORS.get(processed_as, TensorProcessor)
        return processor(config=self._config.to_dict())

    def _mapped(self) -> tuple[dict[str, StoredTensor], dict[str, _Entry]]:
        """The file's tensors under the names of the causal LM, and the shapes they have there."""
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        from qcli.models.stream import skeleton

        model = skeleton(self._config)
        self.config["architectures"] = [type(model).__name__]
        self.config["dtype"] = "bfloat16"
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        # Mapping takes time quadratic in depth, and every block is named as the first one is.
        blocks, first = self.family.blocks, "blk.0."
        count = len(model.get_submodule(blocks))
        del model.get_submodule(blocks)[1:]
        names = {}
        for in_file, name in get_gguf_hf_weights_map(model, self._processor, self._architecture).items():
            for index in range(count) if in_file.startswith(first) else (0,):
                full = name.replace(f"{blocks}.0.", f"{blocks}.{index}.", 1)
                names[in_file.replace(first, f"blk.{index}.", 1)] = full
        unmapped = [entry.name for entry in self._in_file if entry.name not in names]
        if unmapped:
            raise UnsupportedError(
                f"{self.path}: transformers has no place for {', '.join(unmapped[:3])} and would drop it",
                hint="use the model's safetensors folder",
            )
        entries = {names[entry.name]: entry for entry in self._in_file}
        return {name: StoredTensor("F32", shapes[name]) for name in entries}, entries


def _parse(path: Path) -> Any:
    """A GGUFReader on a plain array: cutting a memory map into a hundred thousand strings takes three times as long."""
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    return Reader(path)


@contextmanager
def _lent(reader: Any) -> Iterator[None]:
    """Within: what asks gguf for a reader, as transformers does at every call, gets this one."""
    gguf: Any = import_module("gguf")
    own = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: reader
    try:
        yield
    finally:
        gguf.GGUFReader = own


def _config_of(folder: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config


def _raw(config: PreTrainedConfig) -> dict[str, Any]:
    """What `config.json` of this model would hold."""
    raw: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    for key in ("transformers_version", "_model_name_or_path"):
        raw.pop(key, None)
    return raw

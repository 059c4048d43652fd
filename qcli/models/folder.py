"""Model folders as transformers writes them: `config.json`, safetensors shards, tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.models import families
from qcli.models.companions import code_files, companions
from qcli.models.derived import Derived, SourceTensor
from qcli.models.pretrained import pretrained
from qcli.models.source import ModelSource, reported
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.files import parse_json, read_regular
from qcli.utils.safetensors import Extent, read_header, read_tensors, same_content

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from qcli.models.names import Names

QUANTIZATION = "quantization_config"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_TOKENIZER = "the folder needs the model's tokenizer.json and tokenizer_config.json, or its vocabulary files"
_UNNAMED = "unnamed method"
_TIED = "tie_word_embeddings"
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth")
# Buffers that older checkpoints store and current models compute.
_BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


class FolderSource(ModelSource):
    """A local folder, or the snapshot of a hub model.

    Attributes:
        extents: tensors that the files hold as they are read, by name in the causal LM.
        derived: tensors that are made of others when they are read.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
        super().__init__(path, config, trust_remote_code=trust_remote_code)
        if families.has_row(config):
            families.block_count(config)  # transformers would make lists of any length
        self.extents: dict[str, Extent] = {}
        self.derived: dict[str, Derived] = {}
        stored = {name: tensor for name, tensor in self._stored().items() if not name.endswith(_BUFFERS)}
        renames = self.family.renames
        tensors = self.names.in_model(stored) if renames is None else _normalise(self.family, renames, stored)
        for name, tensor in tensors.items():
            if isinstance(tensor, Extent):
                self.extents[name] = tensor
            else:
                self.derived[name] = tensor
        self._settle_head()

    def _stored(self) -> Mapping[str, SourceTensor]:
        """The folder's tensors, by their names on disk."""
        return self._headers()

    def _headers(self) -> dict[str, Extent]:
        """The tensors of all files, by their names there."""
        return _shards(self.path)

    @cached_property
    def family(self) -> families.Family:
        """The row of the model table, with the groups and folds that the config implies; discovered where there is
        none."""
        if families.has_row(self.config):
            return families.family(self.config)
        from qcli.models.discovery import discovered_family

        return discovered_family(self)

    @cached_property
    def names(self) -> Names:
        """The tensors' names on disk and in the causal LM."""
        from qcli.models.loadable import skeleton
        from qcli.models.names import Names

        with reported(f"{self.path}: transformers cannot build this model"):
            model = skeleton(self.hf_config(), trust_remote_code=self.trust_remote_code)
        return Names(model)

    def on_disk(self, name: str) -> str:
        return self.names.on_disk(name)

    def name_in_model(self, stored: str) -> str:
        return self.names.name_in_model(stored)

    def _joined(self, name: str) -> list[tuple[str, int]]:
        if name not in self.derived:
            return []
        return [(stored, tensor.stored.shape[0]) for stored, tensor in self.derived[name].joined]

    @property
    def left_out(self) -> list[str]:
        return self.names.ignored if self.family.renames is None else []

    def tensors(self) -> dict[str, StoredTensor]:
        tensors: dict[str, SourceTensor] = {**self.extents, **self.derived}
        return {name: tensor.stored for name, tensor in tensors.items()}

    def hf_config(self) -> PreTrainedConfig:
        config = read_hf_config(self.path, trust_remote_code=self.trust_remote_code)
        if self.config.get(_TIED) is False:  # also where config.json says something else
            config.tie_word_embeddings = False
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        with reported(f"{self.path} has no usable tokenizer", hint=_TOKENIZER):
            tokenizer: PreTrainedTokenizerBase = pretrained(
                AutoTokenizer, self.path, trust_remote_code=self.trust_remote_code
            )
        return tokenizer

    def processor(self) -> Any:
        if not any((self.path / name).is_file() for name in _PROCESSORS):
            return super().processor()
        from transformers import AutoProcessor

        missing = None if find_spec("torchvision") else "pip install torchvision: most processors need it"
        with reported(f"{self.path}: its processor cannot be loaded", UnsupportedError, hint=missing):
            processor = pretrained(AutoProcessor, self.path, trust_remote_code=self.trust_remote_code)
        return processor if hasattr(processor, "image_processor") else super().processor()

    def companions(self) -> Mapping[str, Path | bytes]:
        return companions(self.path, trusted=self.trust_remote_code)

    def code_files(self) -> Mapping[str, Path]:
        return code_files(self.path) if self.trust_remote_code else {}

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        for name in names:
            if name not in self.extents and name not in self.derived:
                raise UsageError(f"{self.path} has no tensor {name}", hint="download the model again")
        tensors = read_tensors((name, self.extents[name]) for name in names if name in self.extents)
        tensors |= {name: self.derived[name].read() for name in names if name in self.derived}
        return {name: tensors[name] for name in names}

    def stored_as(self, name: str) -> str:
        return self.derived[name].stored_as if name in self.derived else super().stored_as(name)

    def _settle_head(self) -> None:
        """Let the tensors and the flag of tied embeddings say the same, namely what transformers makes of them: a head
        stored alone is the embedding, a copy of the embedding is left out, and another matrix clears the flag."""
        head, embedding = "lm_head.weight", f"{self.family.embedding}.weight"
        names = self.extents.keys() | self.derived.keys()
        if head not in names or not self.config.get(_TIED, self.family.tied):
            return
        if embedding not in names:
            self.extents = {embedding if name == head else name: extent for name, extent in self.extents.items()}
            self.derived = {embedding if name == head else name: tensor for name, tensor in self.derived.items()}
        elif {head, embedding} <= self.extents.keys() and same_content(self.extents[embedding], self.extents[head]):
            del self.extents[head]
        else:
            text = self.config.get("text_config")
            nested = {"text_config": {**text, _TIED: False}} if isinstance(text, dict) and _TIED in text else {}
            self.config = {**self.config, **nested, _TIED: False}

    def stored_bytes(self, name: str) -> int:
        return self.derived[name].bytes if name in self.derived else self.extents[name].bytes

    def weight_files(self) -> list[Path]:
        made_of = (extent for tensor in self.derived.values() for extent in tensor.origins)
        return sorted({extent.file for extent in (*self.extents.values(), *made_of)})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a model's folder.

    Raises:
        UsageError: it is missing or not a JSON object.
    """
    try:
        content = parse_json(read_regular(file))
    except FileNotFoundError:
        raise UsageError(f"{file} is missing", hint="is this the folder of a transformers model?") from None
    except ValueError:
        raise UsageError(f"{file} is not valid JSON", hint="download the model again") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a JSON object", hint="download the model again")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a model folder.

    Raises:
        UsageError: it is missing or not a JSON object.
    """
    return read_json(path / "config.json")


def read_hf_config(path: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    """`config.json` of a model folder as transformers reads it.

    Raises:
        UsageError: transformers refuses it, or it needs code that is not trusted.
        UnsupportedError: transformers does not know the model type.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    stored = read_config(path)
    if (model_type := stored.get("model_type")) not in CONFIG_MAPPING and "auto_map" not in stored and model_type:
        saved = stored.get("transformers_version")
        raise UnsupportedError(
            f"{path / 'config.json'}: transformers {__version__} does not know model type {model_type!r}",
            hint=f"the model was saved with transformers {saved}: install that or a later one"
            if saved
            else "a later transformers may",
        )
    with reported(str(path / "config.json")):
        config: PreTrainedConfig = pretrained(AutoConfig, path, trust_remote_code=trust_remote_code)
    return config


def quantization_config(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of a config, or of the language model in it; None: there is none."""
    text = config.get("text_config")
    inner = text.get(QUANTIZATION) if isinstance(text, Mapping) else None
    return config[QUANTIZATION] if config.get(QUANTIZATION) is not None else inner


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The `quant_method` of a config; None: the model is not quantized."""
    quantization = quantization_config(config)
    if quantization is None:
        return None
    return str(quantization.get("quant_method") or _UNNAMED) if isinstance(quantization, dict) else _UNNAMED


def _shards(path: Path) -> dict[str, Extent]:
    """Tensors of all shards, by their names in the files."""
    if not (path / _INDEX).exists():
        if not (path / _WEIGHTS).exists():
            raise _no_weights(path)
        return read_header(path / _WEIGHTS)
    weight_map = read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path / _INDEX} has no weight_map", hint="download the model again")
    if (path / _WEIGHTS).exists() and _WEIGHTS not in weight_map.values():
        raise UsageError(
            f"{path} holds two models: {_WEIGHTS}, which transformers would load, and the files of {_INDEX}",
            hint="remove the one that is not meant",
        )
    extents: dict[str, Extent] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if shard != Path(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise UsageError(
                f"{path / _INDEX} points to {shard!r}, which is not a safetensors file in the model's folder",
                hint="do not use this model: its index has been tampered with",
            )
        _join(extents, read_header(path / shard))
    for name, shard in weight_map.items():
        if name not in extents or extents[name].file.name != shard:
            raise UsageError(
                f"{path / str(shard)} has no tensor {name} although the index lists it there",
                hint="download the model again",
            )
    return extents


def _join(extents: dict[str, Extent], more: Mapping[str, Extent]) -> None:
    twice = extents.keys() & more.keys()
    if twice:
        name = min(twice)
        raise UsageError(
            f"{name} is in both {extents[name].file} and {more[name].file}",
            hint="the folder mixes two checkpoints; download the model again",
        )
    extents.update(more)


def _no_weights(path: Path) -> UsageError:
    pickles = [file.name for pattern in _PICKLES for file in sorted(path.glob(pattern))]
    if pickles:
        return UsageError(
            f"{path} has only pickled weights ({pickles[0]}), which can run code when loaded",
            hint="convert them to safetensors if you trust them",
        )
    parts = sorted(file.name for file in path.glob("*-of-*.safetensors"))
    if parts:
        return UsageError(
            f"{path} has parts of a model, such as {parts[0]}, without {_INDEX}",
            hint=f"copy {_INDEX} into it, which lies beside them where they come from",
        )
    return UsageError(f"{path} has neither {_WEIGHTS} nor {_INDEX}", hint="is this the folder of a model?")


def _normalise(
    family: families.Family, renames: tuple[tuple[str, str], ...], tensors: Mapping[str, SourceTensor]
) -> dict[str, SourceTensor]:
    """Tensors by their names in the causal LM: old prefixes renamed, the base model's prefix added if missing."""
    prefix, _, blocks = family.blocks.partition(".")
    bare = not any(name.startswith(f"{prefix}.") for name in tensors)
    bare = bare and any(name.startswith(f"{blocks}.") for name in tensors)
    normal: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        for old, new in renames:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        else:
            if bare and not name.startswith("lm_head."):
                name = f"{prefix}.{name}"
        if name in normal:
            raise UsageError(
                f"the checkpoint holds {name} twice, under an old and a new name",
                hint="the folder mixes two checkpoints; download the model again",
            )
        normal[name] = tensor
    return normal

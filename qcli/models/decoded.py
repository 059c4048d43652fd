"""Model folders that other software quantized: their weights are decoded as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.models.derived import SourceTensor
from qcli.models.encoding import Encoding
from qcli.models.families import text_config
from qcli.models.folder import QUANTIZATION, FolderSource, quantization_config
from qcli.utils import registry
from qcli.utils.dtypes import COMPUTE_DTYPES, STORED_NAME
from qcli.utils.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ENCODINGS = "qcli.models.encodings"


class DecodedSource(FolderSource):
    """A folder whose `quantization_config` is one of `qcli.models.encodings`; otherwise it is as if it had none.

    Attributes:
        encoding: how weights are stored.

    Raises:
        UnsupportedError: a variant that is not read.
        UsageError: tensors and config do not fit together.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> None:
        quantization = quantization_config(config)
        kind: type[Encoding] = registry.load(_ENCODINGS, _module(quantization["quant_method"]))
        self.encoding = kind(quantization, _dtype(config))
        plain = _without_quantization(config)
        if isinstance(text := plain.get("text_config"), dict):
            plain["text_config"] = _without_quantization(text)
        super().__init__(path, plain, trust_remote_code=trust_remote_code)
        if self.family.conv1d:
            raise UnsupportedError(
                f"{path} is already quantized ({kind.method}), which qcli does not read of a {self.family.model_type}",
                hint="use the unquantized model",
            )

    @property
    def quantized_as(self) -> str:
        return self.encoding.description

    def hf_config(self) -> PreTrainedConfig:
        config = super().hf_config()
        for part in (config, config.get_text_config()):
            if hasattr(part, QUANTIZATION):
                del part.quantization_config
        return config

    def _stored(self) -> Mapping[str, SourceTensor]:
        return self.encoding.decoded(self._headers())


def encodings() -> list[str]:
    """The `quant_method`s that are read."""
    return registry.names(_ENCODINGS)


def reads(method: str) -> bool:
    """Whether models of this `quant_method` are read."""
    return _module(method) in encodings()


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != QUANTIZATION}


def _module(method: str) -> str:
    return method.replace("_", "-")


def _dtype(config: Mapping[str, Any]) -> str:
    """What the model runs in, by safetensors' name; bfloat16 if its config does not say."""
    for part in (config, text_config(config)):
        name = str(part.get("dtype") or part.get("torch_dtype"))
        if name in COMPUTE_DTYPES:
            return STORED_NAME[f"torch.{name}"]
    return "BF16"

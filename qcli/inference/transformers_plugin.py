"""The transformers plug-in: after `import qcli`, `from_pretrained` loads qcli checkpoints and keeps them packed.

Its import registers `quant_method: qcli` with transformers.

transformers initializes missing tensors randomly and only warns. This plug-in compares the files' headers with
the checkpoint's config before any weight is read and raises an error for every mismatch.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcli.core.weight import Format
from qcli.inference.linear import QuantLinear
from qcli.inference.vocabulary import QuantEmbedding, pack_embedding, share_codes
from qcli.models.listed_experts import list_experts
from qcli.models.manifest import FORMAT_VERSION
from qcli.models.names import Names, experts_apart
from qcli.models.native import GUARD, NativeStorage
from qcli.models.quantized import LayerStorage
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import VerificationError
from qcli.utils.safetensors import read_header

_LM_HEADS = ("lm_head.", "embed_out.")


class QcliConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint as it is; `NativeStorage` validates it."""

    def __init__(self, **config: Any) -> None:
        vars(self).update(config)
        self.quant_method: Any = "qcli"  # transformers types it as an enum of its own methods


class QcliQuantizer(HfQuantizer):
    """Replaces the linear layers that are packed in the checkpoint with `QuantLinear`."""

    requires_calibration = False

    def __init__(self, quantization_config: QcliConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise VerificationError(
                "QcliConfig cannot quantize while loading",
                hint="run `qcli quantize MODEL --out DIR`, then load DIR",
            )
        self.storage = NativeStorage(quantization_config.to_dict())

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        names = Names(model)  # of its own modules
        list_experts(model)
        replaced = _replace_layers(model, self.storage, names)
        if checkpoint_files:
            _check_files(checkpoint_files, names, model, replaced, self.storage.guard)
        if (guard := self.storage.guard) is not None:
            tail = re.escape(guard.partition(".")[2])  # a model without a head has its own names
            known = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
            model._keys_to_ignore_on_load_unexpected = {*(known or ()), f"{tail}$"}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Experts are not merged: each has linear layers of its own."""
        return experts_apart(weight_conversions)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes: the model's tensors, and the guard as the first quantized layer's weight."""
        if getattr(model, "_hf_peft_config_loaded", False):  # only the adapter is written
            return None, {}
        layer = next(name for name, module in model.named_modules() if isinstance(module, QuantLinear))
        in_causal_model = layer if self.storage.layer(layer) else f"{model.base_model_prefix}.{layer}"
        vars(self.quantization_config).update(format_version=FORMAT_VERSION, guard=f"{in_causal_model}.weight")
        return {**model.state_dict(), f"{layer}.weight": torch.empty(GUARD.shape, dtype=GUARD.torch_dtype)}, {}

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the same tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the packed weights are; the codes themselves are fixed."""
        return True


def _replace_layers(model: Any, storage: NativeStorage, names: Names) -> dict[str, QuantLinear | QuantEmbedding]:
    """Replace every linear layer and embedding that the checkpoint stores quantized; returns the new ones by module
    name."""
    replaced: dict[str, QuantLinear | QuantEmbedding] = {}
    unread: dict[tuple[Format, tuple[int, int], torch.device], dict[str, Tensor]] = {}
    packed, here = ("", "") if storage.guard is None else _prefixes(storage.guard, names.name_in_model(storage.guard))
    for name, module in list(model.named_modules()):
        # The layers of a model without a head are named without the prefix that they have in the checkpoint; those of
        # a language model alone, without that of the model that sees images too.
        known_as = [name, f"{model.base_model_prefix}.{name}"]
        if name.startswith(here):
            known_as.append(f"{packed}{name.removeprefix(here)}")
        layer = next((layer for known in known_as if (layer := storage.layer(known))), _vocabulary(storage, *known_as))
        if layer is None or not isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            continue
        rows, columns = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        if (rows, columns) != layer.shape:
            raise VerificationError(f"{name} is {[rows, columns]} in the model, its checkpoint says {layer.shape}")
        key = layer.format, layer.shape, module.weight.device
        tensors = unread.get(key) or _unread(*key)
        if module.weight.is_meta:  # nothing will be written into them
            unread[key] = tensors
        if isinstance(module, nn.Embedding):
            pack_embedding(module, layer.format, tensors, module.weight.dtype)
            replaced[name] = module  # type: ignore[assignment]  # its class has changed
            continue
        bias: Tensor | None = None if module.bias is None else module.bias.detach()
        replaced[name] = quantized = QuantLinear(layer.format, columns, rows, bias, module.weight.dtype, tensors)
        quantized.name = name
        vars(quantized)["_is_hf_initialized"] = True  # or transformers decodes the weight to fill it with noise
        if storage.activations is not None and layer is not storage.vocabulary.get(name):
            storage.activations.simulate(quantized)
        model.set_submodule(name, quantized)
    share_codes(model)
    return replaced


def _prefixes(*names: str) -> tuple[str, str]:
    """What two names of one layer begin with, where they differ: with the dot."""
    parts = [name.split(".") for name in names]
    while all(parts) and parts[0][-1] == parts[1][-1]:
        parts = [part[:-1] for part in parts]
    first, second = ("".join(f"{word}." for word in part) for part in parts)
    return first, second


def _vocabulary(storage: NativeStorage, *names: str) -> LayerStorage | None:
    """How the embedding or head that has one of these names is stored; None: dense."""
    return next((storage.vocabulary[name] for name in names if name in storage.vocabulary), None)


def _unread(format: Format, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Tensors in whose place those of a checkpoint will be loaded."""
    stored = format.stored(shape)
    return {name: torch.empty(like.shape, dtype=like.torch_dtype, device=device) for name, like in stored.items()}


def _check_files(
    files: list[str], names: Names, model: Any, replaced: dict[str, QuantLinear | QuantEmbedding], guard: str | None
) -> None:
    """Raise VerificationError unless the files hold exactly the tensors that the model needs, and the guard."""
    parts: dict[str, list[StoredTensor]] = {}
    for file in files:
        for name, extent in read_header(Path(file)).items():
            parts.setdefault(names.name_in_model(name), []).append(extent.stored)
    if any(len(stored) > 1 and not names.joins(name) for name, stored in parts.items()):
        raise VerificationError("the checkpoint has tensors twice, under an old and a new name", hint="copy it again")
    on_disk = {
        name: stored[0] if len(stored) == 1 else stored[0].rows(0, sum(part.shape[0] for part in stored))
        for name, stored in parts.items()
    }
    if guard is not None:
        known_as = (guard, guard.removeprefix(f"{model.base_model_prefix}."), names.name_in_model(guard))
        if on_disk.pop(next((name for name in known_as if name in on_disk), guard), None) != GUARD:
            raise VerificationError(f"the guard {guard} is missing", hint="run `qcli verify` on the folder")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {_name_in_model(name, model.base_model_prefix, expected): stored for name, stored in on_disk.items()}
    for layer, module in replaced.items():
        for suffix, stored in module.format.stored(module.shape).items():
            name = f"{layer}.{suffix}"
            if tensors.get(name) != stored:
                has = "is missing" if name not in tensors else f"is {tensors[name]}"
                raise VerificationError(
                    f"{name} {has}, config.json says {stored}", hint="run `qcli verify` on the folder"
                )
        if getattr(module, "bias", None) is not None and f"{layer}.bias" not in tensors:
            raise VerificationError(f"{layer}.bias is missing from the checkpoint", hint="copy it again")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    unknown = sorted(tensors.keys() - expected.keys())
    surplus = [name for name in unknown if name.rpartition(".")[0] in linears or name.endswith(".weight_packed")]
    if surplus:
        raise VerificationError(f"{surplus[0]} belongs to no quantized layer of config.json")
    _check_dense(tensors, expected, model)


def _name_in_model(name: str, prefix: str, expected: Container[str]) -> str:
    """A tensor's name in a model that may have no head, or a head on a checkpoint without; as transformers decides."""
    bare = name.removeprefix(f"{prefix}.")
    return next((known for known in (bare, f"{prefix}.{name}") if known in expected), name)


def _check_dense(tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], model: Any) -> None:
    """Check tensors outside the quantized layers. transformers may rename some while it loads, so a missing name alone
    proves nothing; more missing names than surplus ones do.

    A class made for another task has a head of its own, which is new, and does not need the checkpoint's.
    """
    keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    tied = {*keys, *(origin for name, origin in keys.items() if name in tensors)}  # one of a pair is enough
    other_task = type(model).__name__ not in (model.config.architectures or ())
    has_lm_head = model.get_output_embeddings() is not None

    def of_task(name: str) -> bool:
        if name.startswith(_LM_HEADS):
            return not has_lm_head
        return other_task and hasattr(model, model.base_model_prefix) and not name.startswith(model.base_model_prefix)

    missing = [name for name in expected if name not in tensors and name not in tied and not of_task(name)]
    surplus = [name for name in tensors if name not in expected and name not in tied and not of_task(name)]
    if len(missing) > len(surplus):
        raise VerificationError(f"{missing[0]} is missing from the checkpoint", hint="copy it again")
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise VerificationError(f"{name} has shape {list(tensors[name].shape)}, the model needs {list(shape)}")


if "qcli" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config("qcli")(QcliConfig)
    register_quantizer("qcli")(QcliQuantizer)

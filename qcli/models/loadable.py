"""Whether config.json and weights belong together, so that transformers can load them: no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qcli.models.families import text_config
from qcli.models.pretrained import pretrained
from qcli.models.source import ModelSource, reported
from qcli.utils.dtypes import StoredTensor
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.lean import without_compiler

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_HINT = "config.json and weights must belong to the same model"


def sees_images(config: Mapping[str, Any]) -> bool:
    """Whether the model of a `config.json` takes images too, and transformers does not build it as a causal LM.

    Some types have two classes: a language model alone, and one with a vision tower. The second is meant, unless the
    config names the first.
    """
    from transformers.models.auto import modeling_auto

    text: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    images: Any = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    kind, names = config["model_type"], config.get("architectures") or []
    return kind in images and text.get(kind) not in (images[kind], *names[:1])


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds and loads the model of `config`, with all that its checkpoint holds."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    code = getattr(config, "auto_map", None) or {}
    if not type(config).__module__.startswith("transformers."):  # of the model's own
        images = AutoModelForCausalLM.__name__ not in code and AutoModelForImageTextToText.__name__ in code
    else:
        images = sees_images({"model_type": config.model_type, "architectures": config.architectures})
    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def loading_code(text: str, config: Mapping[str, Any]) -> str:
    """How to load a model in Python: `text`, which does it for a causal LM, with the class that its `config.json`
    needs."""
    return text.replace("AutoModelForCausalLM", "AutoModelForImageTextToText") if sees_images(config) else text


def skeleton(config: PreTrainedConfig, *, trust_remote_code: bool, **options: Any) -> Any:
    """The model of `config` on the meta device, a causal LM or one that sees images too: shapes without memory.

    Args:
        options: as in `from_config`.

    Raises:
        UnsupportedError: transformers has no class that loads such a model by its config, or one that classifies.
    """
    import torch

    auto, kind = auto_class(config), config.model_type
    own = not getattr(config, "auto_map", None) and type(config).__module__.startswith("transformers.")
    if own and type(config) not in auto._model_mapping:
        raise UnsupportedError(
            f"model type {kind!r}: {auto.__name__} of transformers does not load it",
            hint="language models that are part of another, such as one that sees images, are read with it",
        )
    if classifier := _classifier(config):
        raise UnsupportedError(
            f"model type {kind!r}: {classifier} has no head that predicts tokens",
            hint="quantize the language model that it was made of",
        )
    with torch.device("meta"), without_compiler():  # with which torch computes there
        return pretrained(auto, config, trust_remote_code=trust_remote_code, **options)


def _classifier(config: PreTrainedConfig) -> str | None:
    """The class of a model that classifies; None: it does not."""
    from transformers.models.auto import modeling_auto

    if config.model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        images: Any = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        if config.model_type in images:  # all that it is made for
            return str(images[config.model_type])
    return next((name for name in config.architectures or () if "Classification" in name), None)


def quantizable_skeleton(config: PreTrainedConfig, *, trust_remote_code: bool, **options: Any) -> Any:
    """The same with every expert as linear layers of its own."""
    from qcli.models.listed_experts import list_experts

    model = skeleton(config, trust_remote_code=trust_remote_code, **options)
    list_experts(model)
    return model


def require_loadable(source: ModelSource) -> Any:
    """Build the model without weights, and compare its tensors with those that are stored; returns the skeleton.

    Raises:
        UsageError: transformers cannot build the model of this config, its special tokens are outside of the
            vocabulary, or tensors are missing, unexpected, or of another shape than the config implies.
    """
    with reported(f"{source.path}: transformers cannot build this model"):
        model = quantizable_skeleton(source.hf_config(), trust_remote_code=source.trust_remote_code)
    require_tensors(source, model)
    return model


def tied_tensors(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Tensors that are not stored because they share the memory of another: name -> name of the other.

    Args:
        model: its skeleton.
        stored: the tensors that are stored, by name.
    """
    return {name: origin for name, origin in model.all_tied_weights_keys.items() if name not in stored}


def require_tensors(source: ModelSource, model: Any) -> None:
    """Compare the tensors of a skeleton with those that are stored.

    Raises:
        UsageError: as `require_loadable`.
    """
    stored = source.tensors()
    tied = tied_tensors(model, stored)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in stored and name not in tied]
    unexpected = [name for name in stored if name not in expected]
    misshapen = [
        f"{name} ({_shape(stored[name].shape)}, not {_shape(shape)})"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    for names, problem in (
        (missing, "missing tensors"),
        (unexpected, "unexpected tensors"),
        (misshapen, "tensors of another shape than config.json implies:"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UsageError(f"{source.path}: {problem} {', '.join(names[:3])}{more}", hint=_HINT)
    _require_special_tokens(source, model.get_input_embeddings().num_embeddings)


def _require_special_tokens(source: ModelSource, rows: int) -> None:
    """Refuse ids of config.json that the embedding has no row for; a negative one counts from the end, as in torch."""
    for name in _SPECIAL:
        value = text_config(source.config).get(name, source.config.get(name))
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not -rows <= token < rows:
                raise UsageError(
                    f"{source.path}: config.json: {name} is {token}, the embedding has {rows} rows", hint=_HINT
                )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

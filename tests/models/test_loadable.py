"""Weights and config.json that do not belong together are refused before any method starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qcli.export.verify import verify
from qcli.models.loadable import require_loadable
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.quantization.plan import make_plan
from qcli.recipe.load import load_recipe
from qcli.utils import shards
from qcli.utils.errors import UsageError, VerificationError
from tests.models.test_families import ROWS
from tests.quantizing import run
from tests.tiny import VOCAB, tiny_model

Change = Callable[[dict[str, Tensor]], Any]


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def base_model(tensors: dict[str, Tensor]) -> None:
    """As `LlamaModel` is saved."""
    tensors.pop("lm_head.weight")
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


BROKEN: dict[str, tuple[Change | None, dict[str, Any], str]] = {
    "base model": (base_model, {"architectures": ["LlamaModel"]}, "missing tensors lm_head.weight"),
    "no head": (without("lm_head.weight"), {}, "missing tensors lm_head.weight"),
    "no norm": (without("model.norm.weight"), {}, "missing tensors model.norm.weight"),
    "bias": (lambda t: t.update({"lm_head.bias": torch.zeros(VOCAB)}), {}, "unexpected tensors lm_head.bias"),
    "no biases": (None, {"attention_bias": True}, "missing tensors model.layers.0.self_attn.q_proj.bias, "),
    "rows": (None, {"vocab_size": 384}, r"implies: model.embed_tokens.weight \(320 x 64, not 384 x 64\)"),
    "width": (None, {"intermediate_size": 256}, r"implies: .*gate_proj.weight \(128 x 64, not 256 x 64\)"),
    "architecture": (None, {"model_type": "qwen2"}, "missing tensors model.layers.0.self_attn.q_proj.bias"),
    "begin": (None, {"bos_token_id": VOCAB}, "config.json: bos_token_id is 320, the embedding has 320 rows"),
    "ends": (None, {"eos_token_id": [1, 999]}, "config.json: eos_token_id is 999, the embedding has 320 rows"),
    "padding": (None, {"pad_token_id": 320}, "cannot build this model: .*adding"),
}


def broken(case: str, tmp_path: Path) -> Path:
    change, config, _ = BROKEN[case]
    model = tiny_model("llama", tmp_path)
    if change is not None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        shards.write_tensors(model / "model.safetensors", tensors)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return model


@pytest.mark.parametrize("case", BROKEN)
def test_rounding_refuses_what_cannot_be_loaded(case: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=BROKEN[case][2]) as raised:
        run(broken(case, tmp_path), tmp_path / "out", method__name="rtn")
    assert "\n" not in raised.value.message
    assert not list(tmp_path.glob("out*"))


def test_a_plan_refuses_it_too(tmp_path: Path) -> None:
    """Which is all that `--dry-run` makes."""
    recipe = load_recipe(None, {"model": str(broken("rows", tmp_path)), "method.name": "rtn", "method.group_size": 32})
    with pytest.raises(UsageError, match="another shape than config.json implies: "):
        make_plan(recipe)


@pytest.mark.parametrize("padding", [-1, None])
def test_padding_as_transformers_takes_it(padding: int | None, tmp_path: Path) -> None:
    """Early Llama conversions say -1."""
    require_loadable(open_source(str(tiny_model("llama", tmp_path, pad_token_id=padding))))


@pytest.mark.parametrize(("model_type", "settings"), ROWS, ids=str)
def test_whole_models_of_every_family_are_loadable(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    require_loadable(open_source(str(tiny_model(model_type, tmp_path, **settings))))


def test_what_does_not_load_is_not_verified(tmp_path: Path) -> None:
    """Even where the manifest vouches for every byte, as that of a checkpoint from before this check."""
    run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 384}))
    Manifest.read(tmp_path / "out").write(tmp_path / "out")
    with pytest.raises(VerificationError, match="another shape than config.json implies: model.embed_tokens.weight"):
        verify(tmp_path / "out")

"""Packed checkpoints under the other classes of transformers: without a head, and with a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from qcli.inference.linear import QuantLinear
from qcli.utils import shards
from qcli.utils.errors import VerificationError
from tests.quantizing import TOKENS, logits, run, streamed
from tests.tiny import tiny_model

CAUSAL: Any = AutoModelForCausalLM
BASE: Any = AutoModel
HEADS: tuple[Any, ...] = (AutoModelForSequenceClassification, AutoModelForTokenClassification)
FAMILIES = ["llama", "gemma2", "gemma3", "opt", "gpt2", "gpt_neox", "bloom", "falcon", "phi3"]


def checkpoint(tmp_path: Path, model_type: str = "llama", **config: Any) -> Path:
    run(tiny_model(model_type, tmp_path, **config), tmp_path / "out", method__name="rtn")
    return tmp_path / "out"


def hidden(model: Any) -> torch.Tensor:
    """The last hidden states, which the head reads."""
    with torch.no_grad():
        output: torch.Tensor = model.eval()(TOKENS, output_hidden_states=True).hidden_states[-1]
    return output


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    shards.write_tensors(folder / "model.safetensors", tensors)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_base_model_computes_what_it_does_in_the_causal_model(model_type: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, model_type)
    causal = CAUSAL.from_pretrained(folder, dtype=torch.float32)
    base, report = BASE.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and report["unexpected_keys"] <= {"lm_head.weight", "embed_out.weight"}, report
    packed = [sum(isinstance(module, QuantLinear) for module in model.modules()) for model in (base, causal)]
    assert packed[0] == packed[1] > 0
    assert torch.equal(hidden(base), hidden(causal))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loader", HEADS)
def test_only_the_head_of_another_task_is_new(loader: Any, tied: bool, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tie_word_embeddings=tied)
    model, report = loader.from_pretrained(folder, dtype=torch.float32, num_labels=3, output_loading_info=True)
    assert {name.partition(".")[0] for name in report["missing_keys"]} == {"score"}, report
    assert report["unexpected_keys"] <= {"lm_head.weight", "embed_out.weight"}
    assert torch.equal(hidden(model), hidden(CAUSAL.from_pretrained(folder, dtype=torch.float32)))
    assert model(TOKENS).logits.isfinite().all()
    model.save_pretrained(tmp_path / "again")
    again, report = loader.from_pretrained(tmp_path / "again", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    without(tmp_path / "again", "score.weight")
    with pytest.raises(VerificationError, match=r"score\.weight is missing"):
        loader.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight_packed"])
@pytest.mark.parametrize("loader", [BASE, *HEADS])
def test_any_other_missing_tensor_is_an_error(loader: Any, name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tie_word_embeddings=False)
    without(folder, name)
    with pytest.raises(VerificationError, match=rf"{name.removeprefix('model.')} is missing"):
        loader.from_pretrained(folder)


def test_a_missing_language_head_is_an_error(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, tie_word_embeddings=False)
    without(folder, "lm_head.weight")
    with pytest.raises(VerificationError, match=r"lm_head\.weight is missing"):
        CAUSAL.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_base_model_is_saved_and_read_again(model_type: str, tmp_path: Path) -> None:
    folder, again = checkpoint(tmp_path, model_type, tie_word_embeddings=True), tmp_path / "again"
    base = BASE.from_pretrained(folder, dtype=torch.float32)
    base.save_pretrained(again)
    loaded, report = BASE.from_pretrained(again, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(hidden(loaded), hidden(base))
    assert torch.equal(logits(again), logits(folder)), "with the tied head"
    torch.testing.assert_close(streamed(again), logits(folder), rtol=1e-4, atol=1e-4)


def test_pipelines_run(tmp_path: Path) -> None:
    features: Any = pipeline("feature-extraction", model=str(checkpoint(tmp_path)))
    assert len(features("a b")[0]) == 3

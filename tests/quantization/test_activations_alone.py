"""Weights in full precision with quantized inputs (W16A8): through every command that a checkpoint passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcli.core.activations import Activations
from qcli.distillation.distill import distill
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.open import open_source
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UnsupportedError, UsageError
from tests.quantizing import TOKENS, logits, run, streamed, weights, write_text
from tests.tiny import tiny_model

ALONE: dict[str, Any] = {"method__name": "full-precision", "activations__bits": 4, "grouped": False}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_inputs_alone_are_quantized(model_type: str, tmp_path: Path) -> None:
    """The logits are those of the original model with hooks that quantize the input of every linear of its blocks."""
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    result = run(model, out, **ALONE)
    source = open_source(str(model))
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = original(TOKENS).logits
        for linear in source.linears():
            Activations(bits=4).simulate(original.get_submodule(linear.name))
        expected = original(TOKENS).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
    for found in (logits(out), streamed(out)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    bits = next(iter(result.layers)).spec["bits"]
    assert verify(out).bits_per_weight == result.plan.bits_per_weight == bits
    assert {row["method"] for row in inspect(out).layers} == {"full-precision"}
    evaluation = evaluate(
        str(out), EvalOptions([str(write_text(tmp_path))], window=32, max_windows=4), baseline=str(model)
    )
    assert evaluation.kl is not None and evaluation.kl > 0


def test_packed_it_is_the_same_and_other_layouts_refuse(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny_model("llama", tmp_path), out, **ALONE)
    pack(out, tmp_path / "packed", format="qcli", shard_size=10**9)
    assert torch.equal(logits(tmp_path / "packed"), logits(out))
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed").save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(out))
    for format in ("dense", "gguf", "gptq", "compressed-tensors"):
        with pytest.raises(UnsupportedError, match="quantizes activations to 4 bits"):
            pack(out, tmp_path / format, format=format, shard_size=10**9)


def test_single_layers_may_keep_their_weights(tmp_path: Path) -> None:
    """Beside quantized ones; `dense` layers have inputs in full precision, too."""
    rules = [{"match": "*.down_proj", "method": {"name": "full-precision"}}, {"match": "*.o_proj", "dense": True}]
    flags: dict[str, Any] = {"method__name": "rtn", "activations__bits": 4, "overrides": rules}
    out = tmp_path / "out"
    result = run(tiny_model("llama", tmp_path), out, **flags)
    methods = {layer.name.rpartition(".")[2]: layer.method for layer in result.layers}
    assert methods["down_proj"] == "full-precision" and methods["q_proj"] == "rtn" and "o_proj" not in methods
    found, expected = logits(out), streamed(out)
    assert float((found - expected).norm() / expected.norm()) < 0.02, "but for inputs that kernels round the other way"
    again = tmp_path / "again"
    flags["overrides"] = [*rules[:1]]
    run(tiny_model("llama", tmp_path), again, **flags)
    assert weights(again) != weights(out)


def test_half_precision_weights_of_a_float32_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tiny_model("llama", tmp_path), out, method__dtype="float16", **ALONE)
    assert result.plan.bits_per_weight == 16
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": None}, "activations: required by method full-precision, which quantizes inputs alone"),
        ({"low_rank": {"rank": 2}}, "low.rank: weights in full precision have no error to reduce"),
        ({"refine": {"steps": 2}}, "refine: weights in full precision have no error to reduce"),
        ({"distill": {"steps": 2}}, "distill: weights in full precision have no error to reduce"),
        ({"transforms": ["teq"]}, "teq cannot prepare layers of the full-precision format"),
    ],
)
def test_what_has_no_effect_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"method": {"name": "full-precision"}, "activations": {"bits": 8}} | changes
    flags = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        run(tiny_model("llama", tmp_path), tmp_path / "out", write_text(tmp_path), grouped=False, **flags)


def test_there_is_nothing_to_distill(tmp_path: Path) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    run(model, out, **ALONE)
    recipe = load_recipe(None, {"model": str(model), "calibration.data": str(write_text(tmp_path))})
    with pytest.raises(UsageError, match="is in full precision: there are no codes and tables to train"):
        distill(out, recipe, tmp_path / "distilled")

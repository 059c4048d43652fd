"""OneBit on a layer's output error, as a whole method, and as the paper has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from qcli.algorithms.methods.onebit import OneBit
from qcli.core.formats.sign import Sign
from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.block_state import BlockState
from qcli.quantization.sequential import Sequential
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UnsupportedError, UsageError
from tests.algorithms.methods.conftest import Case, output_loss
from tests.quantizing import logits, run, streamed, write_text
from tests.tiny import tiny_model


def test_every_step_helps(case: Case) -> None:
    decomposed = output_loss(OneBit(refit_target=False, error_feedback=False, refit_scales=False), case)
    with_feedback = output_loss(OneBit(refit_target=False, refit_scales=False), case)
    refitted = output_loss(OneBit(refit_target=False), case)
    full = output_loss(OneBit(ridge=0.1), case)
    assert full < refitted < with_feedback < decomposed


def test_bits_are_fixed() -> None:
    with pytest.raises(ValidationError, match="bits"):
        OneBit.model_validate({"bits": 2})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_checkpoints_load_and_refinement_helps(model_type: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"refine__steps": 40, "calibration__samples": 24}
    flags |= {"method__error_feedback": False, "method__refit_target": False}  # leaves something to refine
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    result = run(model, out, write_text(tmp_path), grouped=False, method__name="onebit", **flags)
    assert verify(out).layers == len(result.layers)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    before, after = (sum(outcome[key] for outcome in result.training.values()) for key in ("before", "after"))
    assert after < 0.98 * before


PAPER: dict[str, Any] = {"grouped": False, "method__name": "onebit", "method__paper": True}


@pytest.mark.parametrize("svid", ["svd", "nmf", "power"])
def test_paper_is_the_plain_decomposition(svid: Literal["svd", "nmf", "power"], case: Case) -> None:
    """Signs of W times the best rank-one approximation of `|W|`; no statistics are read."""
    group, method = case.group, OneBit(paper=True, svid=svid)
    assert method.needs == frozenset()
    for name, solution in method.quantize(group).items():
        left, values, right = torch.linalg.svd(group.weights[name].abs())
        expected = group.weights[name].sign() * (values[0] * left[:, :1] @ right[:1])
        torch.testing.assert_close(solution.weight.dense(), expected, rtol=3e-3, atol=1e-5)
        assert (solution.weight.format, solution.target, solution.fallbacks) == (
            Sign(output_norm=True, bias_after_norm=True),
            None,
            [],
        )


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_checkpoints_with_output_norms_load_and_are_refined(model_type: str, tmp_path: Path) -> None:
    """OPT and GPT-2 have biases, which are added after the norm."""
    out = tmp_path / "out"
    flags = PAPER | {"refine__steps": 40, "calibration__samples": 24}
    result = run(tiny_model(model_type, tmp_path), out, write_text(tmp_path), **flags)
    assert verify(out).layers == len(result.layers)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    for outcome in result.training.values():
        assert outcome["after"] < 0.5 * outcome["before"]
    assert {row["output_norm"] for row in inspect(out).layers} == {True}
    assert load_recipe(out / "recipe.yaml", {}).method == OneBit(paper=True)


def loaded(folder: Path) -> ModelStream:
    return ModelStream(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def last_hidden_state(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states after the last block, `[batch, length, hidden]`."""
    stream = loaded(folder)
    *_, last = stream.hidden_states(tokens)
    return last


@pytest.mark.slow
@pytest.mark.parametrize("refined", [False, True])
def test_norms_follow_only_the_layers_of_the_format(
    refined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantized stream is what the checkpoint computes; the full-precision stream has no norms."""
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    streams: list[tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]] = []
    advance = Sequential.advance

    def advance_and_record(quantizer: Sequential, block: BlockState) -> None:
        quantizer.last = block.index + 1  # advances past the last block too
        advance(quantizer, block)
        assert quantizer.original is not None
        hidden, original = (side.training.waiting() for side in (quantizer.quantized, quantizer.original))
        assert isinstance(quantizer.samples.training, torch.Tensor)
        streams.append((quantizer.samples.training, hidden, original))

    monkeypatch.setattr(Sequential, "advance", advance_and_record)
    gptq = {"name": "gptq-like", "refit_target": True, "group_size": 32}
    overrides = [{"match": "*.[kd]*_proj", "method": gptq}, {"match": "*.v_proj", "dense": True}]
    flags = PAPER | {"dtype": "float32", "low_rank__rank": 2} | ({"refine__steps": 10} if refined else {})
    run(model, out, write_text(tmp_path), overrides=overrides, **flags)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    tokens, quantized, original = streams[-1]
    for folder, expected in ((out, quantized), (model, original)):
        torch.testing.assert_close(last_hidden_state(folder, tokens), torch.cat(expected), rtol=1e-4, atol=1e-4)
    attention = loaded(out).load_block(0).get_submodule("self_attn")
    outputs = {name: linear(torch.ones(1, 64)) for name, linear in attention.named_children()}
    is_normed = {name: abs(float(y.var(correction=0)) - 1) < 1e-3 for name, y in outputs.items()}
    assert is_normed == {"q_proj": True, "k_proj": False, "v_proj": False, "o_proj": True}


@pytest.mark.parametrize("step", ["refit_target", "error_feedback", "refit_scales"])
def test_steps_that_are_not_in_the_paper_are_refused_with_it(step: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"paper starts from the weight alone: leave out .*{step}"):
        run(tiny_model("llama", tmp_path), tmp_path / "out", **(PAPER | {f"method__{step}": True}))


def test_linear_scope_and_dense_export_are_refused_with_output_norms(tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    with pytest.raises(UsageError, match=r"refine: scope linear .* set scope to block"):
        run(model, tmp_path / "linear", text, **PAPER, refine__scope="linear")
    run(model, tmp_path / "out", **PAPER)
    with pytest.raises(
        UnsupportedError, match="normalizes the outputs of 14 layers, .* a dense model cannot"
    ) as refused:
        pack(tmp_path / "out", tmp_path / "dense", format="dense", shard_size=10**9)
    assert refused.value.hint is not None
    assert not list(tmp_path.glob("dense*"))
    assert pack(tmp_path / "out", tmp_path / "packed", format="qcli", shard_size=10**9).max_logit_difference == 0

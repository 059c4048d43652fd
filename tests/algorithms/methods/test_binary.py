"""OneBit and DB-LLM on a layer's own objective, and as whole methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from qcli.algorithms.methods.dbllm import DBLLM
from qcli.algorithms.methods.onebit import OneBit
from qcli.algorithms.methods.rtn import RTN
from qcli.core.formats.sign import Sign
from qcli.export.inspect import inspect
from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.block_state import BlockState
from qcli.quantization.sequential import Sequential
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UnsupportedError, UsageError
from tests.algorithms.methods.conftest import Case, loss
from tests.quantizing import logits, run, streamed, write_text
from tests.tiny import tiny_model


def test_every_step_of_onebit_helps(case: Case) -> None:
    decomposed = loss(OneBit(refit_target=False, error_feedback=False, refit_scales=False), case)
    fed = loss(OneBit(refit_target=False, refit_scales=False), case)
    solved = loss(OneBit(refit_target=False), case)
    aimed = loss(OneBit(ridge=0.1), case)
    assert aimed < solved < fed < decomposed


@pytest.mark.parametrize("levels", ["fdb", "symmetric"])
def test_every_step_of_dbllm_helps(levels: Literal["fdb", "symmetric"], case: Case) -> None:
    base: dict[str, Any] = {"levels": levels, "group_size": 32}
    split = loss(DBLLM(**base, refit_target=False, error_feedback=False, refit_tables=False), case)
    fed = loss(DBLLM(**base, refit_target=False, refit_tables=False), case)
    solved = loss(DBLLM(**base, refit_target=False), case)
    aimed = loss(DBLLM(**base, ridge=0.1), case)
    assert aimed < solved < fed < split < loss(RTN(bits=2, group_size=32), case)


def test_widths_are_fixed() -> None:
    with pytest.raises(ValidationError, match="bits"):
        OneBit.model_validate({"bits": 2})
    with pytest.raises(ValidationError, match="bits"):
        DBLLM.model_validate({"bits": 3})


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["onebit", "dbllm"])
def test_packed_is_streamed_and_refinement_helps(method: str, model_type: str, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"method__name": method} | ({} if method == "onebit" else {"method__group_size": 32})
    flags |= {"refine__steps": 40, "calibration__samples": 24}
    flags |= {"method__error_feedback": False, "method__refit_target": False}  # leaves something to refine
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    result = run(model, out, write_text(tmp_path), grouped=False, **flags)
    assert verify(out).layers == len(result.layers)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    before, after = (sum(outcome[key] for outcome in result.training.values()) for key in ("before", "after"))
    assert after < 0.98 * before


@pytest.mark.slow
def test_planes_are_told_as_they_are_stored(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tiny_model("llama", tmp_path), out, write_text(tmp_path), method__name="dbllm", refine__steps=4)
    rows = {row["name"]: row for row in inspect(out).layers}
    source = open_source(str(out))
    assert isinstance(source, NativeSource)
    for name, row in rows.items():
        codes = source.read_quantized(name).codes
        ones = [float((codes >> plane & 1).float().mean()) for plane in (0, 1)]
        assert (row["zeros_plane1"], row["zeros_plane2"]) == pytest.approx((1 - ones[0], 1 - ones[1]))
        assert row["additions_per_weight"] == pytest.approx(sum(ones))
        assert 0.5 < row["zeros_plane1"] < 0.9


PAPER: dict[str, Any] = {"grouped": False, "method__name": "onebit", "method__paper": True}


@pytest.mark.parametrize("svid", ["svd", "nmf", "power"])
def test_onebit_of_the_paper_is_the_plain_decomposition(svid: Literal["svd", "nmf", "power"], case: Case) -> None:
    """Signs of W times the best rank-one `|W|`, whatever the inputs are."""
    group, method = case[0], OneBit(paper=True, svid=svid)
    assert method.needs == frozenset()
    for name, solution in method.quantize(group).items():
        left, values, right = torch.linalg.svd(group.weights[name].abs())
        expected = group.weights[name].sign() * (values[0] * left[:, :1] @ right[:1])
        torch.testing.assert_close(solution.weight.dense(), expected, rtol=3e-3, atol=1e-5)
        assert (solution.weight.format, solution.target, solution.fallbacks) == (Sign(output_norm=True), None, [])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_normed_layers_run_alike_everywhere_and_are_refined(model_type: str, tmp_path: Path) -> None:
    """OPT and GPT-2 have biases, which come before the norm."""
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
def through(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states after the last block."""
    stream = loaded(folder)
    *_, last = stream.hidden_states(tokens)
    return last


@pytest.mark.slow
@pytest.mark.parametrize("refined", [False, True])
def test_norms_follow_only_the_layers_that_have_them(
    refined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantizing sees what the checkpoint computes, and full-precision layers beside it without any norm."""
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    streams: list[tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]] = []
    advance = Sequential.advance

    def watched(quantizer: Sequential, block: BlockState) -> None:
        quantizer.last = block.index + 1  # to see what leaves the last block
        advance(quantizer, block)
        assert quantizer.original is not None
        streams.append((quantizer.tokens.training, quantizer.quantized.training, quantizer.original.training))

    monkeypatch.setattr(Sequential, "advance", watched)
    fed = {"name": "gptq-like", "refit_target": True, "group_size": 32}
    overrides = [{"match": "*.[kd]*_proj", "method": fed}, {"match": "*.v_proj", "dense": True}]
    flags = PAPER | {"dtype": "float32", "low_rank__rank": 2} | ({"refine__steps": 10} if refined else {})
    run(model, out, write_text(tmp_path), overrides=overrides, **flags)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    tokens, quantized, original = streams[-1]
    for folder, expected in ((out, quantized), (model, original)):
        torch.testing.assert_close(through(folder, tokens), torch.cat(expected), rtol=1e-4, atol=1e-4)
    attention = loaded(out).load_block(0).get_submodule("self_attn")
    outputs = {name: linear(torch.ones(1, 64)) for name, linear in attention.named_children()}
    is_normed = {name: abs(float(y.var(correction=0)) - 1) < 1e-3 for name, y in outputs.items()}
    assert is_normed == {"q_proj": True, "k_proj": False, "v_proj": False, "o_proj": True}


@pytest.mark.parametrize("step", ["refit_target", "error_feedback", "refit_scales"])
def test_steps_that_the_paper_does_not_have_are_refused_with_it(step: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"paper starts from the weight alone: leave out .*{step}"):
        run(tiny_model("llama", tmp_path), tmp_path / "out", **(PAPER | {f"method__{step}": True}))


def test_what_cannot_be_done_with_a_norm_is_refused(tmp_path: Path) -> None:
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

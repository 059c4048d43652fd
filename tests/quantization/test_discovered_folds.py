"""TEQ on models without a row: their folds leave the function as it is, and a mixture of experts is trained as any."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qcli.models.families import Fold, Places
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.fold_proof import prove_folds
from qcli.quantization.folding import channel_scales, fold
from qcli.utils.errors import UnsupportedError
from tests.quantizing import TOKENS, logits, run, streamed, weights, write_text
from tests.tiny import WITHOUT_ROW, tiny_model

CPU = torch.device("cpu")
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
# Of the last block; experts by the first.
UNSCALED: dict[str, list[str]] = {
    "olmo3": [*QKV, "mlp.gate_proj", "mlp.up_proj"],  # norms come after
    "olmo_hybrid": [*QKV, "mlp.gate_proj", "mlp.up_proj"],
    "phi": ["mlp.fc2"],  # behind a GELU
    "nemotron": ["mlp.down_proj"],  # behind the square of a ReLU
    "gpt_oss": ["mlp.experts.0.down_proj"],  # up is clamped, and 1 added
    "gemma4_text": ["self_attn.o_proj", "per_layer_input_gate", "per_layer_projection"],  # values are normalized
    "zamba": ["linear", "mamba_decoder.mamba.out_proj"],
    "longcat_flash": [  # some experts are the identity, which reads what the others do
        *(f"{owner}.0.{name}_proj" for owner in ("mlp.experts", "mlps") for name in ("gate", "up")),
    ],
    "deepseek_v4": ["self_attn.o_b_proj", "mlp.experts.0.down_proj", "mlp.shared_experts.down_proj"],
}
ROUTERS = {
    "mixtral": "mlp.gate.weight",
    "qwen3_moe": "mlp.gate.weight",
    "gpt_oss": "mlp.router.weight",
    "llama4_text": "feed_forward.router.weight",
    "deepseek_v3": "mlp.gate.weight",
    "deepseek_v4": "mlp.gate.weight",
}


def stream_of(model_type: str, folder: Path) -> ModelStream:
    return ModelStream(open_source(str(tiny_model(model_type, folder))), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("model_type", sorted(WITHOUT_ROW))
def test_folds_leave_logits_as_they_are(model_type: str, tmp_path: Path) -> None:
    """All folds of all blocks, and each alone changes its modules; without its readers it changes the output."""
    stream = stream_of(model_type, tmp_path)
    family, generator = stream.family, torch.Generator().manual_seed(0)
    hidden = stream.embed(TOKENS)
    changed = hidden
    for index in range(stream.n_blocks):
        block, twin = stream.load_block(index), stream.load_block(index)
        scales = channel_scales(twin, family.folds_of(index), stream.config)
        alphas = [torch.exp(0.3 * torch.randn(scale.size, generator=generator)) for scale in scales]
        fold(twin, scales, alphas)
        before = dict(block.named_parameters())
        differ = {name for name, value in twin.named_parameters() if not torch.equal(value, before[name])}
        folded = {f"{path}.weight" for scale in scales for path in (scale.producer, *scale.readers)}
        folded |= {name for scale in scales for name in scale.dense}
        assert folded <= differ and all(name in folded or name.endswith("bias") for name in differ)
        half = stream.load_block(index)
        fold(half, [replace(scale, readers=(), dense=()) for scale in scales], alphas)
        expected = stream.run_block(block, index, hidden)
        assert float((stream.run_block(half, index, hidden) - expected).norm() / expected.norm()) > 1e-3
        hidden, changed = expected, stream.run_block(twin, index, changed)
    torch.testing.assert_close(stream.logits(changed), stream.logits(hidden), rtol=1e-3, atol=1e-4)
    others = tuple(f".experts.{number}." for number in (1, 2, 3))
    unscaled = family.unscaled(stream.n_blocks - 1, lambda _: True)
    unscaled = [path for path in unscaled if not any(other in path for other in others)]
    assert unscaled == UNSCALED.get(model_type, [])


@pytest.mark.parametrize("model_type", sorted(ROUTERS))
def test_the_norm_before_experts_is_read_by_all_of_them_and_the_router(model_type: str, tmp_path: Path) -> None:
    family = open_source(str(tiny_model(model_type, tmp_path))).family
    (norm,) = (each for each in family.folds_of(1) if each.dense)
    assert norm.dense == (ROUTERS[model_type],)
    prefix = ROUTERS[model_type].partition(".")[0]
    experts = {f"{prefix}.experts.{n}.{name}_proj" for n in range(4) for name in ("gate", "up")}
    assert experts <= set(norm.readers)


def test_a_mixture_is_prepared_by_teq_and_loads(tmp_path: Path) -> None:
    model, out, text = tiny_model("qwen3_moe", tmp_path), tmp_path / "out", write_text(tmp_path)
    result = run(model, out, text, method__name="teq", method__bits=4, method__steps=15, method__lr=0.02)
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    outcomes = [result.training[f"block {block} teq"] for block in (0, 1)]
    before, after = (sum(outcome[when] for outcome in outcomes) for when in ("before", "after"))
    assert after < 0.9 * before  # the tokens that go to other experts are a part of it
    router = "model.layers.1.mlp.gate.weight"
    stored, original = (load_file(folder / "model.safetensors")[router] for folder in (out, model))
    factors = stored / original
    assert torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-5) and float(factors.std()) > 0.01
    assert json.loads((out / "qcli.manifest.json").read_text())["unscaled"] == []
    run(model, tmp_path / "again", text, method__name="teq", method__bits=4, method__steps=15, method__lr=0.02)
    assert weights(out) == weights(tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "loss"),
    [
        *(
            (name, "block")
            for name in ("granite", "glm4", "cohere2", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_5_text")
        ),
        ("mixtral", "kl"),
        ("deepseek_v3", "kl"),
    ],
)
def test_any_model_is_prepared_by_teq_and_loads(model_type: str, loss: str, tmp_path: Path) -> None:
    model, out, text = tiny_model(model_type, tmp_path), tmp_path / "out", write_text(tmp_path)
    settings: dict[str, Any] = {"method__bits": 8, "method__steps": 4, "method__loss": loss}
    result = run(model, out, text, method__name="teq", **settings)
    assert result.plan.unscaled == [path.replace(".0.", ".*.") for path in UNSCALED.get(model_type, [])]
    packed, target = streamed(out), logits(model).log_softmax(-1)
    torch.testing.assert_close(logits(out), packed, rtol=1e-4, atol=1e-4)
    assert (target.exp() * (target - packed.log_softmax(-1))).sum(-1).median() < 1e-3


def test_a_router_is_rounded_to_what_is_stored(tmp_path: Path) -> None:
    block = torch.nn.Module()
    block.norm, block.out = torch.nn.RMSNorm(8), torch.nn.Linear(8, 4)
    block.router = torch.nn.Parameter(torch.rand(3, 8))
    before = block.router.detach().clone()
    places = Places(range(8), range(8))
    (scale,) = channel_scales(block, [Fold("norm", ("out",), dense=("router",), places=places)], None)  # type: ignore[arg-type]
    alpha = torch.rand(8) + 0.5
    assert fold(block, [scale], [alpha], {"router": torch.bfloat16}) == ["norm.weight", "out.weight", "router"]
    assert torch.equal(block.router, (before * alpha).bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "qwen3_moe"])
def test_folds_are_proven_in_half_precision(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    prove_folds(ModelStream(open_source(str(tiny_model(model_type, tmp_path))), device=CPU, dtype=dtype))


def test_a_fold_that_changes_the_function_is_refused(tmp_path: Path) -> None:
    stream = stream_of("granite", tmp_path)
    prove_folds(stream)
    wrong = Fold("mlp.gate_proj", ("mlp.down_proj",), places=Places(range(128), range(128)))
    stream.family = replace(stream.family, folds_by_block=((), (wrong,)))
    message = r"block 1 computes something else when factors are folded into mlp\.gate_proj and mlp\.down_proj"
    with pytest.raises(UnsupportedError, match=message):
        prove_folds(stream)

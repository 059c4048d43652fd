"""Folded blocks compute what they did before, in every family; what cannot be folded is named."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from qcli.algorithms.transform import ChannelScale
from qcli.models.families import FAMILIES, Fold, Places, Rows
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.folding import channel_scales, fold
from tests.tiny import VARIANTS, tiny_model

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
ROWS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in FAMILIES),
    *VARIANTS,
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen2", {"intermediate_size": 120, "num_attention_heads": 16}),
    ("qwen3", {"head_dim": 32}),
    ("phi3", {"num_key_value_heads": 4}),
    ("opt", {"activation_function": "gelu"}),
    ("falcon", {"multi_query": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "bias": True}),
    ("stablelm", {"qk_layernorm": True, "use_qkv_bias": True}),
]
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATE_UP = ["mlp.gate_proj", "mlp.up_proj"]
UNSCALED: dict[tuple[str, str], list[str]] = {
    ("olmo2", ""): [*QKV, *GATE_UP],
    ("opt", "False"): [*QKV, "fc1"],
    ("opt", "gelu"): ["fc2"],
    ("gpt2", ""): ["mlp.c_proj"],
    ("gpt_neox", "*"): ["mlp.dense_4h_to_h"],
    ("bloom", ""): ["mlp.dense_4h_to_h"],
    ("bloom", "True"): ["self_attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ("falcon", "*"): ["mlp.dense_4h_to_h"],
}


class Case:
    """A tiny model, and the names under which `UNSCALED` may know it."""

    def __init__(self, model_type: str, overrides: dict[str, Any], folder: Path, dtype: torch.dtype = torch.float32):
        path = tiny_model(model_type, folder, **overrides)
        self.stream = ModelStream(open_source(str(path)), device=torch.device("cpu"), dtype=dtype)
        self.names = ((model_type, settings(overrides)), (model_type, "*"))
        self.hidden = self.stream.embed(TOKENS)
        self._block = self.stream.load_block(0)
        self.before = self.output(self._block)
        self.scales = channel_scales(self._block, self.stream.family.folds_of(0), self.stream.config)

    def block(self) -> nn.Module:
        return copy.deepcopy(self._block)

    def has_weight(self, path: str) -> bool:
        return self._block.get_submodule(path)._parameters.get("weight") is not None

    def output(self, block: nn.Module) -> Tensor:
        return self.stream.run_block(block, 0, self.hidden)

    def logits(self, blocks: list[nn.Module]) -> Tensor:
        hidden = self.hidden
        for index, block in enumerate(blocks):
            hidden = self.stream.run_block(block, index, hidden)
        return self.stream.logits(hidden)


def settings(overrides: dict[str, Any]) -> str:
    return "-".join(map(str, overrides.values()))


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: f"{row[0]}-{settings(row[1])}")
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model_type, overrides = request.param
    return Case(model_type, overrides, tmp_path_factory.mktemp("models"))


def random_alphas(scales: list[ChannelScale], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.exp(0.3 * torch.randn(scale.size, generator=generator)) for scale in scales]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def dense_dtypes(block: nn.Module, dtype: torch.dtype, *tensors: str) -> dict[str, torch.dtype]:
    vectors = {name for name, value in block.named_parameters() if value.ndim == 1}
    return {name: dtype for name in vectors if name.rpartition(".")[2] in tensors}


def test_logits_stay_as_they_are(case: Case) -> None:
    """With norm weights rounded to bfloat16 in the second block."""
    blocks = [case.stream.load_block(index) for index in range(case.stream.n_blocks)]
    before = case.logits(blocks)
    for index, (block, dtype) in enumerate(zip(blocks, (torch.float32, torch.bfloat16), strict=True)):
        original = {name: value.clone() for name, value in block.state_dict().items()}
        scales = channel_scales(block, case.stream.family.folds_of(0), case.stream.config)
        dtypes = dense_dtypes(block, dtype, "weight")
        changed = fold(block, scales, random_alphas(scales, seed=index), dtypes)
        now = block.state_dict()
        assert set(changed) == {name for name, value in now.items() if not torch.equal(value, original[name])}
        assert all(torch.equal(now[name], now[name].to(dtype).float()) for name in changed if name in dtypes)
    assert relative(case.logits(blocks), before) < 1e-4


def test_rounded_biases_cost_their_rounding_and_no_more(case: Case) -> None:
    block = case.block()
    dtypes = dense_dtypes(block, torch.bfloat16, "weight", "bias")
    changed = fold(block, case.scales, random_alphas(case.scales), dtypes)
    now = block.state_dict()
    vectors = [now[name] for name in changed if now[name].ndim == 1]
    assert all(torch.equal(value, value.bfloat16().float()) for value in vectors)
    assert relative(case.output(block), case.before) < 2e-3


def test_each_fold_changes_its_modules_and_no_other(case: Case) -> None:
    """And half a fold is no equivalence: without its readers the output is another, so the test has eyes."""
    original = case.block()
    assert case.scales
    for scale in case.scales:
        block, alphas = case.block(), random_alphas([scale])
        changed = fold(block, [scale], alphas)
        assert {name.rpartition(".")[0] for name in changed} == {scale.producer, *scale.readers}
        for path in scale.readers:
            old, new = (ModelStream.weight_of(each.get_submodule(path)) for each in (original, block))
            assert bool(((old - new).norm(dim=0) > 0).all()), "every column of a reader is scaled"
        assert relative(case.output(block), case.before) < 1e-5

        block = case.block()
        fold(block, [replace(scale, readers=())], alphas)
        assert relative(case.output(block), case.before) > 1e-3


def test_what_cannot_be_scaled_is_listed(case: Case) -> None:
    expected = next((UNSCALED[name] for name in case.names if name in UNSCALED), [])
    assert case.stream.family.unscaled(0, case.has_weight) == expected


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_bfloat16_blocks_keep_their_function_up_to_their_precision(model_type: str, tmp_path: Path) -> None:
    exact, low = (Case(model_type, {}, tmp_path, dtype) for dtype in (torch.float32, torch.bfloat16))
    block = low.block()
    fold(block, low.scales, random_alphas(low.scales))
    assert all(value.dtype == torch.bfloat16 for value in block.parameters())
    rounding = relative(low.before.float(), exact.before)
    assert relative(low.output(block).float(), exact.before) < 3 * rounding


HEADS, HEAD_DIM = 4, 3


def attention(outputs: int) -> nn.Module:
    block = nn.Module()
    block.values = nn.Linear(HEADS * HEAD_DIM, outputs)
    block.out = nn.Linear(HEADS * HEAD_DIM, 5)
    return block


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", ["all", "stacked v", "interleaved v"])
def test_values_find_the_heads_that_read_them(rows: Rows, kv_heads: int) -> None:
    """Against the layout written down row by row."""
    shared = HEADS // kv_heads
    channel = {(head, part): head * HEAD_DIM + part for head in range(kv_heads) for part in range(HEAD_DIM)}
    layout: list[int] = []  # the channel of each output row, -1 for queries and keys
    if rows == "stacked v":
        layout += [-1] * (HEADS * HEAD_DIM) + [-1] * (kv_heads * HEAD_DIM)
    for head in range(kv_heads):
        if rows == "interleaved v":
            layout += [-1] * (shared * HEAD_DIM) + [-1] * HEAD_DIM
        layout += [channel[head, part] for part in range(HEAD_DIM)]
    columns = [channel[head // shared, part] for head in range(HEADS) for part in range(HEAD_DIM)]

    config = LlamaConfig(num_attention_heads=HEADS)
    (scale,) = channel_scales(attention(len(layout)), [Fold("values", ("out",), rows)], config)
    assert scale.outputs.tolist() == layout
    assert scale.inputs.tolist() == columns
    assert scale.size == kv_heads * HEAD_DIM


class Norm(nn.Module):
    """A norm's last step: `x * (offset + weight)`."""

    def __init__(self, weight: list[float], offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.tensor(weight)), offset


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_channels_whose_norm_weight_has_no_quotient_are_left_alone(offset: float) -> None:
    """Zero, and what overflows float16, stay as they are, for norm and readers alike."""
    block = nn.Module()
    block.norm, block.out = Norm([2.0 - offset, 0.0 - offset, 60000.0, -3.0 - offset], offset), nn.Linear(4, 2)
    norm, out = block.norm.weight.clone(), block.out.weight.clone()
    every = torch.arange(4)
    scale = ChannelScale("norm", ("out",), every, every, 4, norm_offset=offset)
    alpha = torch.tensor([4.0, 4.0, 0.5, 2.0])
    assert fold(block, [scale], [alpha], {"norm.weight": torch.float16}) == ["norm.weight", "out.weight"]
    expected = torch.tensor([4.0, 1.0, 1.0, 2.0])
    torch.testing.assert_close((block.norm.weight + offset) * expected, norm + offset)
    torch.testing.assert_close(block.out.weight, out * expected)


def test_channels_of_a_norm_that_are_not_folded_stay() -> None:
    """And leave those alone that are."""
    block = nn.Module()
    block.norm, block.out = nn.RMSNorm(4), nn.Linear(4, 3)
    x, places = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), (0, -1, 1, 2)
    with torch.no_grad():
        before = block.out(block.norm(x))
    scales = channel_scales(block, [Fold("norm", ("out",), places=Places(places, places))], LlamaConfig())
    fold(block, scales, [torch.tensor([2.0, 4.0, 0.5])])
    assert block.norm.weight.tolist() == [0.5, 1.0, 0.25, 2.0]
    with torch.no_grad():
        torch.testing.assert_close(block.out(block.norm(x)), before)


def test_norms_without_weights_have_no_scale(tmp_path: Path) -> None:
    case = Case("opt", {"layer_norm_elementwise_affine": False}, tmp_path)
    assert [scale.producer for scale in case.scales] == ["self_attn.v_proj", "fc1"]
    assert case.stream.family.unscaled(0, case.has_weight) == [*QKV, "fc1"]

"""GGUF: transformers and the gguf package read the same weights; layers that fit no type are refused or requantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qcli.algorithms.solvers import grid
from qcli.cli.main import main
from qcli.core.formats.affine import Affine, ZeroPoint
from qcli.core.weight import QuantizedWeight
from qcli.export.gguf import blocks as gguf_blocks
from qcli.export.gguf import metadata as gguf_metadata
from qcli.export.gguf import types as gguf_types
from qcli.export.gguf import vocabulary as gguf_vocabulary
from qcli.export.pack import pack, plan_pack
from qcli.export.result import PackResult
from qcli.export.targets import gguf as gguf_export
from qcli.export.verify import verify
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.utils.errors import UnsupportedError, UsageError, VerificationError
from tests.quantizing import TOKENS, run, streamed, write_text
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer, with_merge


def packed(folder: Path, model: Path, **flags: Any) -> tuple[Path, PackResult]:
    options: dict[str, Any] = {"method__name": "rtn", **flags}
    run(with_merge(model), folder / "native", **options)
    return folder / "packed", pack(folder / "native", folder / "packed", format="gguf", shard_size=10**9)


def load_with_transformers(folder: Path) -> Any:
    """The model as transformers converts the file, without the other files of the folder."""
    auto: Any = AutoModelForCausalLM
    for file in folder.iterdir():
        if file.name != "model.gguf":
            file.unlink()
    return auto.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_transformers_reads_the_same_weights(model_type: str, symmetric: bool, tmp_path: Path) -> None:
    config = {"head_dim": 128} if model_type == "qwen3" else {}  # the only size that transformers expects of a file
    out, result = packed(tmp_path, tiny_model(model_type, tmp_path, **config), method__symmetric=symmetric)
    assert result.max_logit_difference < (1e-3 if "gemma" in model_type else 1e-9)
    assert result.notes == {"exact": f"14 layers {'Q4_0' if symmetric else 'Q5_0'}"}
    assert result.bits_per_weight == (4.5 if symmetric else 5.5)
    source = open_source(str(tmp_path / "native"))
    model = load_with_transformers(out)
    state = model.state_dict()
    for name, tensor in source.read(source.tensors()).items():
        if "norm" in name:
            assert torch.allclose(state[name], tensor, atol=1e-6), name
        else:
            assert torch.equal(state[name], tensor), name
    if "gemma" not in model_type and model_type != "mistral":  # whose settings transformers does not take from the file
        with torch.no_grad():
            assert torch.allclose(model(TOKENS).logits, streamed(tmp_path / "native"), atol=1e-4)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_dense_tensors_keep_their_dtype(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, attention_bias=True)
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    out, result = packed(tmp_path, model, overrides=[{"match": "*.down_proj", "dense": True}])
    assert result.max_logit_difference == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert {types[key] for key in ("token_embd.weight", "output.weight", "blk.1.ffn_down.weight")} == {name}
    assert {types[key] for key in ("blk.0.attn_norm.weight", "blk.0.attn_q.bias")} == {"F32"}
    state, source = load_with_transformers(out).state_dict(), open_source(str(tmp_path / "native"))
    for key, tensor in source.read(source.tensors()).items():
        if key in state:  # transformers converts no biases of llama
            assert torch.equal(state[key], tensor.float()), key


def test_gemma_one_is_read_back_by_qcli(tmp_path: Path) -> None:
    """transformers has no converter for it."""
    _, result = packed(tmp_path, tiny_model("gemma", tmp_path))
    assert result.max_logit_difference < 1e-3


def test_qcli_opens_the_packed_folder(tmp_path: Path) -> None:
    out, _ = packed(tmp_path, tiny_model("llama", tmp_path))
    assert torch.equal(streamed(out), streamed(tmp_path / "native"))
    assert verify(out).layers == 14
    assert {"model.gguf", "config.json", "tokenizer.json", "recipe.yaml"} <= {file.name for file in out.iterdir()}


def test_a_gguf_file_beside_a_checkpoint_is_not_opened_instead(tmp_path: Path) -> None:
    out, _ = packed(tmp_path, tiny_model("llama", tmp_path))
    native = tmp_path / "native"
    (native / "model.gguf").write_bytes((out / "model.gguf").read_bytes())
    assert isinstance(open_source(str(native)), NativeSource)
    with pytest.raises(VerificationError, match=r"model\.gguf holds weights but is not listed in the manifest"):
        verify(native)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 8),
    st.sampled_from([-1, 32, 48, 64, 96]),
    st.sampled_from(("none", "integer", "float")),
    st.sampled_from([32, 64, 96, 100]),
    st.integers(0, 2**31),
)
def test_blocks_decode_to_the_same_weights(
    bits: int, group: int, zero_point: ZeroPoint, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    format = Affine(bits=bits, group_size=group, zero_point=zero_point)
    shape = (3, columns)
    tables = grid.minmax(torch.randn(shape, generator=generator), format)
    if seed % 2 and zero_point != "none":  # scales with which every offset is a float16
        tables["weight_scale"] = torch.full_like(tables["weight_scale"], 2.0**-6)
        tables["weight_zero_point"] = tables["weight_zero_point"].round()
    codes = torch.randint(1 << bits, shape, generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(format, shape, codes, tables)
    type = next(gguf_blocks.exact_types(weight), None)
    if columns % 32 or (0 < group < columns and group % 32):
        assert type is None
    elif zero_point == "none" or (zero_point == "integer" and bits < 8):
        assert type is not None
    if type is not None:
        blocks = gguf_blocks.encode(weight, type)
        assert blocks.shape == (3, columns // 32 * type.bytes)
        decoded = dequantize(blocks.numpy(), gguf.GGMLQuantizationType[type.name])
        assert np.array_equal(decoded, weight.dense().numpy())
        smaller = [t for t in gguf_types.BLOCK_TYPES if t.bytes < type.bytes and t.offset == type.offset]
        assert not any(gguf_blocks.holds(t, weight) for t in smaller)


@pytest.mark.parametrize(
    ("codes", "zero_point", "name"),
    [([0, 15], 8, "Q4_0"), ([0, 7], 3, "Q4_0"), ([0, 15], 0, "Q4_1"), ([0, 31], 16, "Q5_0"), ([0, 31], 2, "Q5_1")],
)
def test_the_smallest_exact_type_is_used(codes: list[int], zero_point: int, name: str) -> None:
    row = torch.tensor([codes * 16], dtype=torch.uint8)
    tables = {
        "weight_scale": torch.tensor([[0.25]], dtype=torch.float16),
        "weight_zero_point": torch.tensor([[zero_point]], dtype=torch.uint8),
    }
    weight = QuantizedWeight(Affine(bits=5, group_size=32, zero_point="integer"), (1, 32), row, tables)
    type = next(gguf_blocks.exact_types(weight), None)
    assert type is not None and type.name == name


def test_layers_that_fit_no_type_are_refused_or_requantized(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little grid. " * 200)
    run(with_merge(tiny_model("llama", tmp_path)), tmp_path / "native", text, method__name="rtn", low_rank__rank=2)
    with pytest.raises(UnsupportedError, match="fits none of gguf's types exactly") as raised:
        pack(tmp_path / "native", tmp_path / "packed", format="gguf", shard_size=10**9)
    assert raised.value.hint is not None and "--requantize" in raised.value.hint
    assert not (tmp_path / "packed").exists()
    result = pack(tmp_path / "native", tmp_path / "packed", format="gguf", shard_size=10**9, requantize="Q8_0")
    assert result.notes == {"exact": "none", "rounded": "14 layers to Q8_0"}
    assert 0 < result.kl < 0.01
    with pytest.raises(UsageError, match="format dense cannot requantize layers"):
        pack(tmp_path / "native", tmp_path / "dense", format="dense", shard_size=10**9, requantize="Q8_0")


# What fits no type, and the flags that `qcli quantize` is told to take, if any would do.
UNFITTING: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "groups of 16": ({}, {"method.group_size": 16}, "--group-size 32"),
    "8 asymmetric bits": ({}, {"method.bits": 8}, "--symmetric"),
    "float zero points": ({}, {"method.zero_point": "float"}, "--set method.zero_point=integer"),
    "groups of 16, 8 asymmetric bits": ({}, {"method.group_size": 16, "method.bits": 8}, "--group-size 32 --symmetric"),
    "low rank": ({}, {"method.name": "gptq-like", "low_rank.rank": 2}, ""),
    "inputs of down": ({"intermediate_size": 72}, {"method.group_size": 8}, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNFITTING)
def test_what_a_refusal_suggests_works(name: str, tmp_path: Path) -> None:
    config, fields, fitting = UNFITTING[name]
    model, text = with_merge(tiny_model("llama", tmp_path, **config)), write_text(tmp_path)
    options = {"method__name": "rtn", **{key.replace(".", "__"): value for key, value in fields.items()}}
    run(model, tmp_path / "native", text, **options)
    with pytest.raises(UnsupportedError) as raised:
        plan_pack(tmp_path / "native", format="gguf")
    hint = str(raised.value.hint)
    first, _, type = hint.partition("pack it as qcli or dense, or round it: --requantize ")
    assert pack(tmp_path / "native", tmp_path / "rounded", format="gguf", shard_size=10**9, requantize=type).rounded
    for format in ("qcli", "dense"):
        plan_pack(tmp_path / "native", format=format)
    assert first == (f"quantize with {fitting}, " if fitting else "")
    if fitting:
        command = ["quantize", str(model), "--out", str(tmp_path / "fitting"), "--method", "rtn", "--data", str(text)]
        command += [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]
        grouped = [] if "method.group_size" in fields else ["--group-size", "32"]
        with pytest.raises(SystemExit) as ended:
            main([*command, *grouped, *fitting.split()])
        assert not ended.value.code
        plan_pack(tmp_path / "fitting", format="gguf")


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_what_a_refusal_of_the_model_suggests_works(model_type: str, tmp_path: Path) -> None:
    """Of a family, and of a tokenizer."""
    run(tiny_model(model_type, tmp_path), tmp_path / "native", method__name="rtn", method__group_size=16)
    with pytest.raises(UnsupportedError) as raised:
        plan_pack(tmp_path / "native", format="gguf")
    assert raised.value.hint == "pack it as qcli or dense"
    for format in ("qcli", "dense"):
        plan_pack(tmp_path / "native", format=format)


@pytest.fixture
def fits_no_type(tmp_path: Path) -> Path:
    """A checkpoint in groups of 16."""
    model = with_merge(tiny_model("llama", tmp_path))
    run(model, tmp_path / "native", method__name="rtn", method__group_size=16)
    return tmp_path / "native"


@pytest.mark.slow
@pytest.mark.parametrize("type", gguf_types.REQUANTIZE_TYPES)
def test_requantized_layers_are_within_the_rounding_of_their_type(
    type: str, fits_no_type: Path, tmp_path: Path
) -> None:
    result = pack(fits_no_type, tmp_path / "packed", format="gguf", shard_size=10**9, requantize=type)
    assert result.rounded == 14
    assert verify(tmp_path / "packed").layers == 14


@pytest.mark.parametrize(("type", "off"), [("Q8_0", 0.02), ("BF16", 0.02), ("Q5_0", 0.1)])
def test_larger_errors_than_the_rounding_of_the_type_are_detected(
    type: str, off: float, fits_no_type: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gguf_export.GGUF._encoded

    def encoded(self: Any, source: Any, entry: Any) -> Any:
        """A source whose largest weights are a little larger."""
        if "ffn_up" not in entry.name:
            return original(self, source, entry)
        read = source.read
        with monkeypatch.context() as patch:
            patch.setattr(source, "read", lambda names: {name: (1 + off) * t for name, t in read(names).items()})
            return original(self, source, entry)

    monkeypatch.setattr(gguf_export.GGUF, "_encoded", encoded)
    with pytest.raises(VerificationError, match=r"up_proj\.weight does not read back"):
        pack(fits_no_type, tmp_path / "packed", format="gguf", shard_size=10**9, requantize=type)


def test_wrong_weights_do_not_pass_for_rounding(
    fits_no_type: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = quants.quantize
    monkeypatch.setattr(quants, "quantize", lambda tensor, type: quantize(np.roll(tensor, 1, axis=0), type))
    with pytest.raises(VerificationError, match="does not read back"):
        pack(fits_no_type, tmp_path / "packed", format="gguf", shard_size=10**9, requantize="Q4_0")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("opt", {}, "opt is not among llama"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn rotary embedding"),
        ("llama", {"hidden_act": "gelu"}, "gelu as the MLP's activation"),
        ("qwen3", {"attention_bias": True}, "attention_bias True of qwen3"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 24, llama.cpp takes 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "gemma2 without attn_logit_softcapping"),
    ],
)
def test_models_that_llama_cpp_does_not_compute_are_refused(
    model_type: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        gguf_metadata.architecture(tiny_config(model_type, **config))


def test_llama_3_rotary_factors_are_those_of_transformers(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = tiny_config("llama", rope_scaling=rope)
    factors = gguf_metadata.rope_factors(config)
    assert factors is not None and len(set(factors.tolist())) > 2
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert torch.allclose(plain / factors, expected, rtol=1e-5)
    _, result = packed(tmp_path, tiny_model("llama", tmp_path, rope_scaling=rope))
    assert result.max_logit_difference == 0
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "packed" / "model.gguf").tensors]
    assert names[0] == "rope_freqs.weight"


def test_byte_level_tokenizer_survives(tmp_path: Path) -> None:
    model = with_merge(tiny_model("llama", tmp_path))
    auto: Any = AutoTokenizer
    expected = auto.from_pretrained(model)("cab naïve 123").input_ids
    assert 259 in expected
    out, _ = packed(tmp_path, model)
    reader = gguf.GGUFReader(out / "model.gguf")
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is False
    (out / "tokenizer.json").unlink()
    (out / "config.json").unlink()
    tokenizer = auto.from_pretrained(out, gguf_file="model.gguf")
    assert tokenizer("cab naïve 123").input_ids == expected


def test_named_chat_templates_survive(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    (model / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(f"{name}: {{{{ messages }}}}")
    (model / "LICENSE").write_text("mine")
    out, _ = packed(tmp_path, model)
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.chat_templates"].contents() == ["rag", "tool_use"]
    assert fields["tokenizer.chat_template.rag"].contents() == "rag: {{ messages }}"
    assert fields["tokenizer.chat_template"].contents() == tiny_tokenizer().chat_template
    assert (out / "additional_chat_templates" / "rag.jinja").exists() and (out / "LICENSE").read_text() == "mine"
    assert verify(out).unlisted == []


def test_tokenizers_without_merges_are_refused(tmp_path: Path) -> None:
    run(tiny_model("llama", tmp_path), tmp_path / "native", method__name="rtn")
    with pytest.raises(UnsupportedError, match="has no merges"):
        pack(tmp_path / "native", tmp_path / "packed", format="gguf", shard_size=10**9)
    assert not (tmp_path / "packed").exists()


class Recorder:
    """Stands for a GGUFWriter."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.values.__setitem__(name.removeprefix("add_"), value)


def test_sentencepiece_scores_are_merge_ranks() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁a", "b")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    recorder = Recorder()
    gguf_vocabulary.write(recorder, tokenizer, 12)
    written = recorder.values
    assert written["tokenizer_model"] == "llama"
    assert written["add_space_prefix"] is True
    assert dict(zip(tokens[7:], written["token_scores"][7:10], strict=True)) == {"▁a": -1, "ab": 0, "▁ab": -2}
    assert written["token_list"][10:] == ["[PAD10]", "[PAD11]"]
    kind = gguf.TokenType
    assert written["token_types"][:4] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.BYTE]
    assert written["token_types"][9:] == [kind.NORMAL, kind.UNUSED, kind.UNUSED]


@pytest.mark.parametrize(
    ("splitting", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (pre_tokenizers.Whitespace(), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
    ],
)
def test_pre_tokenizers_have_llama_cpps_name_or_are_refused(splitting: Any, name: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = splitting
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if name is not None:
        assert gguf_vocabulary._pre_tokenizer(described) == name
        return
    with pytest.raises(UnsupportedError, match="has a pre-tokenizer that llama.cpp does not know"):
        gguf_vocabulary._pre_tokenizer(described)

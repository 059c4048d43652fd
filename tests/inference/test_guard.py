"""A native checkpoint is either loaded by qcli's plug-in or by nothing: never with random layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from qcli.export.pack import pack
from qcli.export.verify import verify
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.quantization.plan import make_plan
from qcli.recipe.load import load_recipe
from qcli.utils import shards
from qcli.utils.errors import VerificationError
from tests.quantizing import TOKENS, logits, run, streamed
from tests.tiny import tiny_model

GUARD = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn")
    return tmp_path / "out"


@pytest.fixture
def without_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is where qcli was not imported."""
    mappings: tuple[Any, ...] = (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
    for mapping in mappings:
        monkeypatch.delitem(mapping, "qcli")


def resaved(checkpoint: Path) -> Path:
    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(checkpoint).save_pretrained(checkpoint.parent / "again")
    return checkpoint.parent / "again"


def make_old(checkpoint: Path) -> None:
    """As version 1 of the format was: without a guard."""
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[GUARD]
    shards.write_tensors(checkpoint / "model.safetensors", tensors)
    edit(checkpoint, format_version=1, guard=None)
    Manifest.read(checkpoint).write(checkpoint)


def edit(checkpoint: Path, **fields: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    quantization = config["quantization_config"] | fields
    config["quantization_config"] = {key: value for key, value in quantization.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(config))


LOADERS: tuple[Any, ...] = (AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification, LlamaForCausalLM)


@pytest.mark.parametrize("loader", LOADERS)
def test_transformers_alone_refuses_it(loader: Any, checkpoint: Path, without_plugin: None) -> None:
    with pytest.raises(RuntimeError):
        loader.from_pretrained(checkpoint)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3", "falcon"])
def test_so_it_does_of_families_with_other_names(model_type: str, tmp_path: Path, without_plugin: None) -> None:
    run(tiny_model(model_type, tmp_path), tmp_path / "out", method__name="rtn")
    with pytest.raises(RuntimeError):
        auto: Any = AutoModelForCausalLM
        auto.from_pretrained(tmp_path / "out")


def test_what_save_pretrained_writes_is_guarded_too(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    again = resaved(checkpoint)
    assert torch.equal(logits(again), logits(checkpoint))
    torch.testing.assert_close(streamed(again), logits(checkpoint), rtol=1e-4, atol=1e-4)
    request.getfixturevalue("without_plugin")
    with pytest.raises(RuntimeError):
        LOADERS[0].from_pretrained(again)


def test_the_plugin_reports_no_guard_as_unexpected(checkpoint: Path) -> None:
    _, report = LOADERS[0].from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values()), report


def test_checkpoints_of_version_1_load_and_become_current(checkpoint: Path, tmp_path: Path) -> None:
    expected = logits(checkpoint)
    make_old(checkpoint)
    assert torch.equal(logits(checkpoint), expected)
    pack(checkpoint, tmp_path / "packed", format="qcli", shard_size=10**9)
    verify(tmp_path / "packed")
    for folder in (tmp_path / "packed", resaved(checkpoint)):
        assert load_file(folder / "model.safetensors")[GUARD].shape == (0,)
        assert torch.equal(logits(folder), expected)


def test_a_checkpoint_without_its_guard_is_refused(checkpoint: Path) -> None:
    make_old(checkpoint)
    edit(checkpoint, format_version=2, guard=GUARD)
    for opened in (lambda: open_source(str(checkpoint)), lambda: logits(checkpoint)):
        with pytest.raises(VerificationError, match="guard"):
            opened()
    edit(checkpoint, guard=3)
    with pytest.raises(VerificationError, match="guard: must be the name of a tensor"):
        open_source(str(checkpoint))


def test_the_guard_takes_no_space_and_is_planned(checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "llama-0"
    recipe = load_recipe(None, {"model": str(model), "method.name": "rtn", "method.group_size": 32})
    assert make_plan(recipe).bytes == (checkpoint / "model.safetensors").stat().st_size
    assert GUARD in open_source(str(checkpoint)).tensors(), "the decoded weight"
    assert verify(checkpoint).layers == 14


def test_ignoring_mismatched_sizes_is_the_one_way_around_it(
    checkpoint: Path, request: pytest.FixtureRequest
) -> None:  # docs/reliability.md says so
    loaded = LOADERS[0].from_pretrained(checkpoint, dtype=torch.float32, ignore_mismatched_sizes=True)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(TOKENS).logits, logits(checkpoint)), "harmless with the plug-in"
    request.getfixturevalue("without_plugin")
    _, report = LOADERS[0].from_pretrained(checkpoint, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name for name, *_ in report["mismatched_keys"]] == [GUARD]
    assert len(report["missing_keys"]) == 13, "all quantized layers but the guard's"


@pytest.mark.slow
def test_the_plugin_may_be_the_first_import() -> None:
    code = (
        "import qcli.inference.transformers_plugin; from transformers.quantizers.auto import *; "
        "print('qcli' in AUTO_QUANTIZATION_CONFIG_MAPPING)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"

"""What pack writes runs in the software that its layout is made for, or pack fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcli.export import proof
from qcli.export.pack import pack
from qcli.export.targets.compressed_tensors import CompressedTensors
from qcli.utils.errors import UnsupportedError, VerificationError
from tests.quantizing import logits, run
from tests.tiny import tiny_model, with_merge


@pytest.fixture
def native(tmp_path: Path) -> Path:
    model = with_merge(tiny_model("llama", tmp_path, tie_word_embeddings=False, num_hidden_layers=3))
    run(model, tmp_path / "native", method__name="rtn", method__symmetric=True)
    return tmp_path / "native"


def test_every_layout_says_what_ran_it(native: Path, tmp_path: Path) -> None:
    expected = {
        "qcli": "transformers ",
        "dense": "transformers ",
        "compressed-tensors": "transformers ",
        "gptq": "not tried: engines of this layout need kernels of their own",
        "gguf": "not tried: llama.cpp; its files were read back",
    }
    for format, start in expected.items():
        result = pack(native, tmp_path / format, format=format, shard_size=10**9)
        described = result.proof.described()
        assert described.startswith(start), format
        assert described.split(" (")[0] in (tmp_path / format / "README.md").read_text().replace("\\", "")
        if result.proof.engine is not None:
            assert (result.proof.blocks, result.proof.of, result.proof.kl) == (3, 3, 0)
            assert result.proof.max_logit_difference == 0


@pytest.mark.parametrize("format", ["qcli", "dense", "compressed-tensors"])
def test_a_large_model_is_proven_on_its_first_blocks(
    format: str, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    original = proof._run

    def observed(folder: Path, *arguments: Any) -> Any:
        loaded.append(json.loads((folder / "config.json").read_text())["num_hidden_layers"])
        return original(folder, *arguments)

    monkeypatch.setattr(proof, "_WHOLE", 1000)
    monkeypatch.setattr(proof, "_run", observed)
    result = pack(native, tmp_path / "packed", format=format, shard_size=10**9)
    assert loaded == [2]
    assert "the first 2 of 3 blocks: logits differ by at most 0 (KL 0)" in result.proof.described()
    assert not [path for path in (tmp_path / "packed").rglob("*") if "proof" in path.name]


def test_lists_of_a_config_with_an_entry_for_each_block_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_WHOLE", 1000)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    model = tiny_model("gemma3", tmp_path, num_hidden_layers=3, layer_types=layers)
    run(model, tmp_path / "native", method__name="rtn", method__symmetric=True)
    result = pack(tmp_path / "native", tmp_path / "packed", format="dense", shard_size=10**9)
    assert (result.proof.blocks, result.proof.of, result.proof.max_logit_difference) == (2, 3, 0)


@pytest.mark.parametrize("settings", [{}, {"new_decoder_architecture": True, "num_kv_heads": 2}], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_falcon_whose_linear_layers_are_its_own_runs_in_transformers(
    settings: dict[str, Any], symmetric: bool, tmp_path: Path
) -> None:
    run(
        tiny_model("falcon", tmp_path, **settings), tmp_path / "native", method__name="rtn", method__symmetric=symmetric
    )
    result = pack(tmp_path / "native", tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    assert result.proof.engine is not None and result.proof.kl < 1e-5
    difference = (logits(tmp_path / "packed") - logits(tmp_path / "native")).abs().max()
    assert difference < 0.02, "transformers decodes in float16"


def test_falcon_of_several_formats_is_refused(tmp_path: Path) -> None:
    """transformers would decode all layers by the first scheme."""
    other = [{"match": "*.dense_h_to_4h", "method": {"bits": 8}}]
    run(
        tiny_model("falcon", tmp_path),
        tmp_path / "native",
        method__name="rtn",
        method__symmetric=True,
        overrides=other,
    )
    with pytest.raises(UnsupportedError, match="several formats in a falcon model") as raised:
        pack(tmp_path / "native", tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    assert raised.value.hint is not None and raised.value.hint.startswith("quantize with one format for all layers")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dequantize": False}, "does not run what was written"),
        ({"config_groups": {}}, "does not run what was written|computes other logits"),
    ],
)
def test_what_does_not_run_gets_no_name(
    change: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """qcli reads it back, transformers does not run it: as Falcon's layers were before."""
    original = proof.prove

    def prove(source: Any, folder: Path, *arguments: Any) -> Any:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= change
        (folder / "config.json").write_text(json.dumps(config))
        return original(source, folder, *arguments)

    monkeypatch.setattr("qcli.export.pack.prove", prove)
    run(tiny_model("falcon", tmp_path), tmp_path / "native", method__name="rtn", method__symmetric=True)
    with pytest.raises(VerificationError, match=problem):
        pack(tmp_path / "native", tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    assert not list(tmp_path.glob("packed*"))


def test_an_engine_that_is_not_installed_is_named(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompressedTensors, "proven_with", lambda *_: ["transformers", "no-such-package"])
    result = pack(native, tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    assert result.proof.described() == "not tried: no-such-package is not installed"

"""The main verb on tiny models of every family: the packed model, what it loses, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qcli import run_folder, shards
from qcli.errors import QcliError, ResourceError, StateError, UnsupportedError, UsageError, VerificationError
from qcli.models.native import NativeSource
from qcli.models.source import open_source
from qcli.models.stream import ModelStream
from qcli.pack import pack
from qcli.quantize import Result, quantize
from qcli.recipe import load_recipe
from qcli.verify import verify
from tests.tiny import CONFIGS, VARIANTS, tiny_model

TOKENS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(400)))
    return file


def run(model: Path, out: Path, text: Path | None = None, **flags: Any) -> Result:
    given: dict[str, Any] = {"model": str(model), "out": str(out), "method.group_size": 32}
    if text is not None:
        given |= {"calibration.data": str(text), "calibration.samples": 6, "calibration.seq_len": 32}
    recipe, _ = load_recipe(None, given | {key.replace("__", "."): value for key, value in flags.items()})
    return quantize(recipe)


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "qcli.manifest.json"}


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        *((name, {}) for name in CONFIGS),
        *((name, {"tie_word_embeddings": True}) for name in CONFIGS),
        *VARIANTS,
    ],
    ids=str,
)
def test_every_family_at_eight_bits(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """8-bit rtn stays close; from_pretrained, packed, equals the streamed fake-quantized model; reload is exact."""
    model, out = tiny_model(model_type, tmp_path, **overrides), tmp_path / "out"
    run(model, out, method__name="rtn", method__bits=8)
    packed, original = logits(out), logits(model)
    distance = (packed.log_softmax(-1) - original.log_softmax(-1)).abs().max()
    assert 0 < float(distance) < 0.25
    stream = ModelStream(open_source(str(out)), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        hidden = stream.embed(TOKENS)
        for index in range(stream.n_blocks):
            hidden = stream.run_block(stream.load_block(index), index, hidden)
        torch.testing.assert_close(stream.logits(hidden), packed, rtol=1e-5, atol=1e-5)
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(again)
    assert torch.equal(logits(again), packed)
    assert verify(out).layers == len(open_source(str(out)).linears())


@pytest.mark.parametrize(("model_type", "overrides"), [*((name, {}) for name in CONFIGS), *VARIANTS], ids=str)
def test_gptq_like_runs_on_every_family(model_type: str, overrides: dict[str, Any], tmp_path: Path, text: Path) -> None:
    model = tiny_model(model_type, tmp_path, **overrides)
    result = run(model, tmp_path / "out", text, method__bits=4)
    assert result.fallbacks == {}
    assert {layer.measure for layer in result.layers} == {"output"}
    assert max(layer.error for layer in result.layers) < 0.05
    assert float((logits(tmp_path / "out").log_softmax(-1) - logits(model).log_softmax(-1)).abs().mean()) < 0.5


def test_mixed_methods_and_dense_layers(tmp_path: Path, text: Path) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    recipe, _ = load_recipe(
        None,
        {"model": str(model), "out": str(out), "calibration.data": str(text)}
        | {"calibration.samples": 4, "calibration.seq_len": 32, "method.group_size": 32},
        [
            "overrides=[{match: '*.0.self_attn.v_proj', dense: true},"
            " {match: '*.q_proj', method: {name: rtn, bits: 8}},"
            " {match: '*.1.mlp.*', method: {bits: 2, group_size: -1, symmetric: true}}]"
        ],
    )
    quantize(recipe)
    source = open_source(str(out))
    assert isinstance(source, NativeSource)
    assert "model.layers.0.self_attn.v_proj" not in source.packed
    assert source.packed["model.layers.1.self_attn.v_proj"].format.bits == 4
    assert source.packed["model.layers.0.self_attn.q_proj"].format.bits == 8
    assert source.packed["model.layers.1.mlp.up_proj"].format.bits == 2
    dense = "model.layers.0.self_attn.v_proj.weight"
    assert torch.equal(load_file(out / "model.safetensors")[dense], load_file(model / "model.safetensors")[dense])
    assert bool(logits(out).isfinite().all())
    verify(out)


def test_ragged_tails_load_and_verify(tmp_path: Path, text: Path) -> None:
    model, out = tiny_model("llama", tmp_path, intermediate_size=172), tmp_path / "out"
    run(model, out, text, method__group_size=48, method__group_tail="ragged", method__bits=3)
    verify(out)
    assert bool(logits(out).isfinite().all())


def test_same_recipe_same_bytes(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    state = torch.random.get_rng_state()
    run(model, tmp_path / "a", text)
    run(model, tmp_path / "b", text)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    second["recipe.yaml"] = second["recipe.yaml"].replace(b"/b\n", b"/a\n")
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is nobody's to touch"


@pytest.mark.parametrize("method", ["rtn", "gptq-like"])
def test_interrupted_anywhere_and_resumed_gives_the_same_bytes(
    method: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails once at every commit and once while assembling, resuming each time."""
    model = tiny_model("llama", tmp_path, num_hidden_layers=3)
    run(model, tmp_path / "straight", text, method__name=method)
    commit, join, fuse = run_folder.RunFolder.commit, shards.join, [1]

    def burn(*_: Any) -> None:
        fuse[0] -= 1
        if fuse[0] < 0:
            raise KeyboardInterrupt

    def dying_commit(self: run_folder.RunFolder, part: str, tensors: Any, report: Any = None) -> None:
        burn()
        commit(self, part, tensors, report)

    def dying_join(*arguments: Any) -> None:
        burn()
        join(*arguments)

    monkeypatch.setattr(run_folder.RunFolder, "commit", dying_commit)
    monkeypatch.setattr(shards, "join", dying_join)
    out, interruptions = tmp_path / "resumed", 0
    while not out.exists():
        fuse[0] = 1
        try:
            result = run(model, out, text, method__name=method)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions >= 4
    assert result.resumed_blocks == 3
    assert not out.with_name("resumed.partial").exists()
    expected = weights(tmp_path / "straight")
    expected["recipe.yaml"] = expected["recipe.yaml"].replace(b"straight", b"resumed")
    assert weights(out) == expected


def test_killed_process_resumes(tmp_path: Path, text: Path) -> None:
    """SIGKILL from outside, at whatever moment."""
    model, out = tiny_model("llama", tmp_path, num_hidden_layers=10), tmp_path / "out"
    data = ["--data", str(text), "--samples", "6", "--seq-len", "32", "--group-size", "32"]
    command = [sys.executable, "-c", "from qcli.cli.main import main; main()", "quantize", str(model), *data]
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while (not journal.exists() or journal.read_text().count("\n") < 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    done = subprocess.run(
        [*command, "--out", str(out), "--resume", "required", "--json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["resumed_blocks"] >= 3
    subprocess.run([*command, "--out", str(tmp_path / "straight")], capture_output=True, check=True)
    expected = weights(tmp_path / "straight")
    expected["recipe.yaml"] = expected["recipe.yaml"].replace(b"straight", b"out")
    found = weights(out)
    found["recipe.yaml"] = found["recipe.yaml"].replace(b"resume: required", b"resume: auto")
    assert found == expected


def test_resume_refuses_other_settings(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, out, text)
    with pytest.raises(StateError, match=r"recipe.method.bits was 4, is 3"):
        run(model, out, text, method__bits=3)
    run(model, out, text, method__bits=3, resume="never")
    assert out.exists()
    with pytest.raises(StateError, match="exists"):
        run(model, out, text)
    with pytest.raises(StateError, match="no interrupted run"):
        run(model, tmp_path / "new", text, resume="required")


def test_full_disk_loses_nothing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(ResourceError, match="has 0.00 GB free"):
            run(model, out, text)
    calls = [0]
    sync = os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 9:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            run(model, out, text)
    assert not out.exists()
    assert not list((tmp_path / "out.partial").glob(".*partial"))
    run(model, out, text)
    run(model, tmp_path / "straight", text)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()


def test_broken_weights_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    shards.write_tensors(file, tensors)
    with pytest.raises(UsageError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        run(model, tmp_path / "out", method__name="rtn")
    assert not (tmp_path / "out").exists()


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e8
    shards.write_tensors(file, tensors)
    with pytest.raises(VerificationError, match=r"model.layers.0.mlp.up_proj: weight_scale holds NaN or infinity"):
        run(model, tmp_path / "out", method__name="rtn")


def edited(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn")
    return tmp_path / "out"


def both_refuse(folder: Path, message: str) -> None:
    """qcli's own reading and transformers' loading stop with the same kind of error."""
    with pytest.raises(QcliError, match=message):
        open_source(str(folder))
    with pytest.raises(VerificationError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_other_versions_are_refused(checkpoint: Path) -> None:
    edited(checkpoint, format_version=2)
    both_refuse(checkpoint, "version 2 is not supported")


def test_unknown_formats_are_refused(checkpoint: Path) -> None:
    layers = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["layers"]
    edited(checkpoint, layers=[{**layer, "format": "fractal"} for layer in layers])
    both_refuse(checkpoint, "unknown weight format 'fractal'")


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_missing_tensors_are_refused(checkpoint: Path, suffix: str) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.1.mlp.down_proj.{suffix}"]
    shards.write_tensors(file, tensors)
    both_refuse(checkpoint, rf"model.layers.1.mlp.down_proj.{suffix}")


def test_reshaped_and_surplus_tensors_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    shards.write_tensors(file, {**whole, name: whole[name].float()})
    both_refuse(checkpoint, name)
    shards.write_tensors(file, {**whole, "model.layers.0.input_layernorm.weight_packed": whole[name]})
    both_refuse(checkpoint, "input_layernorm.weight_packed belongs to no quantized layer")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "recipe.yaml", "tokenizer.json"])
def test_one_changed_byte_fails_verification(checkpoint: Path, name: str) -> None:
    verify(checkpoint)
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(VerificationError, match=name):
        verify(checkpoint)


def test_missing_dense_tensors_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    shards.write_tensors(file, tensors)
    with pytest.raises(VerificationError, match=r"model.norm.weight is missing"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": []}', "not json", '{"files": {"config.json": {}}}'])
def test_broken_manifests_are_refused(checkpoint: Path, manifest: str) -> None:
    (checkpoint / "qcli.manifest.json").write_text(manifest)
    with pytest.raises(VerificationError, match="is not a manifest"):
        verify(checkpoint)


def test_quantizing_twice_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already quantized"):
        run(checkpoint, tmp_path / "twice", method__name="rtn", method__bits=2)


def test_tiny_weights_are_reported(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-5
    shards.write_tensors(file, tensors)
    result = run(model, tmp_path / "out", method__name="rtn", method__bits=8)
    (note,) = result.fallbacks["model.layers.0.mlp.up_proj"]
    assert "too small for float16" in note


def test_overflowing_activations_are_refused(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"] *= 2000
    shards.write_tensors(file, tensors)
    with pytest.raises(UsageError, match=r"inputs of mlp.down_proj are not finite"):
        run(model, tmp_path / "out", text, dtype="float16")


def test_failed_start_does_not_block_the_corrected_command(tmp_path: Path, text: Path) -> None:
    model = tiny_model("llama", tmp_path)
    with pytest.raises(UsageError):
        run(model, tmp_path / "out", tmp_path / "nowhere.txt")
    run(model, tmp_path / "out", text)


def test_other_text_in_the_same_file_is_another_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards, "join", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", text)
    text.write_text(text.read_text()[::-1])
    with pytest.raises(StateError, match="data was"):
        run(model, tmp_path / "out", text)
    unfinished = tmp_path / "out.partial"
    run(model, tmp_path / "other", method__name="rtn")
    with pytest.raises(StateError, match="interrupted run"):
        pack(tmp_path / "other", tmp_path / "out", format="qcli", shard_size=10**9)
    assert (unfinished / "journal.jsonl").exists()


def test_dense_export_is_an_ordinary_model(checkpoint: Path, tmp_path: Path) -> None:
    found = pack(checkpoint, tmp_path / "dense", format="dense", shard_size=100_000)
    assert found["files"] > 1
    assert found["max_logit_difference"] == 0
    assert found["bits_per_weight"] == 32
    verify(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(checkpoint), rtol=1e-5, atol=1e-5)


def test_nobody_else_writes_the_same_output(tmp_path: Path) -> None:
    with (
        run_folder.RunFolder(tmp_path / "out", {"a": 1}, "auto"),
        pytest.raises(StateError, match="another qcli is writing"),
    ):
        run_folder.RunFolder(tmp_path / "out", {"a": 1}, "auto")


def test_torn_journal_line_does_not_count(tmp_path: Path) -> None:
    with run_folder.RunFolder(tmp_path / "out", {}, "auto") as folder:
        folder.commit("00000", {"x": torch.ones(3)}, {"rows": 1})
        folder.commit("00001", {"x": torch.ones(3)})
    journal = folder.path / "journal.jsonl"
    journal.write_text(journal.read_text()[:-5])
    folder.file("00000").write_bytes(b"damaged")
    with run_folder.RunFolder(tmp_path / "out", {}, "auto") as folder:
        assert folder.done("00000") is None
        assert folder.done("00001") is None
        folder.commit("00001", {"x": torch.ones(3)})
        assert folder.done("00001") is not None

"""Packing leaves a complete folder that computes the same, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcli.export.pack import pack
from qcli.export.target import dense_config
from qcli.export.targets import dense
from qcli.export.verify import verify
from qcli.models.open import open_source
from qcli.utils import shards
from qcli.utils.errors import QcliError, ResourceError, StateError, UsageError, VerificationError, os_problem
from qcli.utils.run_folder import RunFolder
from tests.quantizing import run
from tests.tiny import tiny_model


@pytest.fixture
def native(tmp_path: Path) -> Path:
    run(tiny_model("llama", tmp_path), tmp_path / "native", method__name="rtn")
    return tmp_path / "native"


@pytest.mark.parametrize("change", [{"group_size": 0}, {"shape": [0, 64]}, {"shape": [64, -1]}, {"bits": 0}], ids=str)
def test_a_layer_entry_of_no_matrix_is_refused(native: Path, change: dict[str, Any]) -> None:
    config = json.loads((native / "config.json").read_text())
    config["quantization_config"]["layers"][0] |= change
    (native / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError) as raised:
        open_source(str(native))
    assert "\n" not in raised.value.message


def test_a_manifest_whose_bits_are_no_number_does_not_verify(native: Path) -> None:
    manifest = json.loads((native / "qcli.manifest.json").read_text())
    (native / "qcli.manifest.json").write_text(json.dumps(manifest | {"bits_per_weight": float("nan")}))
    with pytest.raises(VerificationError, match=r"qcli\.manifest\.json|its manifest says nan"):
        verify(native)


def failed(native: Path, out: Path, error: type[QcliError], message: str) -> QcliError:
    """The error that packing raises; it leaves no files."""
    with pytest.raises(error, match=message) as raised:
        pack(native, out, format="dense", shard_size=10**9)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == []
    return raised.value


def test_a_config_that_changes_the_logits_is_detected(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every weight reads back, but the logits differ."""
    monkeypatch.setattr(dense, "dense_config", lambda source: dense_config(source) | {"rms_norm_eps": 10.0})
    failed(native, tmp_path / "packed", VerificationError, "logits differ from those of the quantized checkpoint")


def test_a_weight_that_reads_back_changed_is_detected(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = shards.write_tensors

    def write(file: Path, tensors: Any) -> None:
        original(file, {name: -tensor if "up_proj" in name else tensor for name, tensor in tensors.items()})

    monkeypatch.setattr(shards, "write_tensors", write)
    failed(native, tmp_path / "packed", VerificationError, "up_proj.weight does not read back")


def test_a_full_disk_does_not_promise_to_resume(native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def join(*_: Any) -> None:
        raise os_problem(OSError(28, "No space left on device"), tmp_path)

    monkeypatch.setattr(shards, "join", join)
    hint = failed(native, tmp_path / "packed", ResourceError, "No space left").hint
    assert hint is not None and "free some space" in hint and "kept" not in hint


def test_changed_weights_are_not_packed(native: Path, tmp_path: Path) -> None:
    """The manifest of what is packed would vouch for them."""
    file = native / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    failed(native, tmp_path / "packed", VerificationError, "model.safetensors has changed: its hash differs")


def test_a_killed_pack_starts_over(native: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "packed", {"pack": "dense"}, "never") as killed:
        half = killed.result()
        (half / "model.safetensors").write_bytes(b"half")
    pack(native, tmp_path / "packed", format="dense", shard_size=10**9)
    assert verify(tmp_path / "packed").unlisted == []
    assert not half.parent.exists()


def test_packed_folders_cannot_be_packed_again(native: Path, tmp_path: Path) -> None:
    for format in ("dense", "compressed-tensors"):
        pack(native, tmp_path / format, format=format, shard_size=10**9)
        with pytest.raises(UsageError, match=f"is already packed as {format}") as raised:
            pack(tmp_path / format, tmp_path / "again", format="qcli", shard_size=10**9)
        assert raised.value.hint is not None and "`qcli quantize`" in raised.value.hint
    pack(native, tmp_path / "native-again", format="qcli", shard_size=10**5)
    pack(tmp_path / "native-again", tmp_path / "last", format="compressed-tensors", shard_size=10**9)
    assert verify(tmp_path / "last").layers == 14


def test_existing_output_is_refused_before_any_weight_is_read(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense.Dense, "check", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "file").touch()
    with pytest.raises(StateError, match="packed"):
        pack(native, tmp_path / "packed", format="dense", shard_size=10**9)

"""`qcli pack`, `verify` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Invoke


@pytest.fixture
def checkpoint(invoke: Invoke, model: Path, tmp_path: Path) -> Path:
    out = tmp_path / "quantized"
    flags = (
        "--method",
        "rtn",
        "--bits",
        3,
        "--group-size",
        32,
        "--set",
        "overrides=[{match: '*.k_proj', dense: true}]",
    )
    assert invoke("quantize", model, *flags, "--out", out).code == 0
    return out


def test_packed_checkpoint_verifies(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    code, out, err = invoke("pack", checkpoint, "--out", packed, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["max_logit_difference"] == 0
    assert result["bytes"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    code, out, err = invoke("verify", packed)
    assert code == 0, err
    assert str(packed) in out
    code, _, err = invoke("pack", checkpoint, "--out", packed)
    assert code == 3


def test_changed_bytes_are_found(invoke: Invoke, checkpoint: Path) -> None:
    assert json.loads(invoke("verify", checkpoint, "--json").out)["layers"] == 12
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = invoke("verify", checkpoint, "--json")
    assert (code, out) == (4, "")
    assert "model.safetensors" in err.splitlines()[-1]


def test_inspect_shows_layers_and_origin(invoke: Invoke, model: Path, checkpoint: Path) -> None:
    code, out, _ = invoke("inspect", checkpoint, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["model"] == str(model)
    assert {layer["bits"] for layer in found["layers"] if layer["method"]} == {3}
    code, out, _ = invoke("inspect", checkpoint)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines() if "recipe override" in line] == [["self_attn.k_proj", "2"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "gguff"), "--format: unknown format 'gguff'"),
        (("--shard-size", "5 gigs"), "--shard-size: must be written as '500MB' or '5GB', not '5 gigs'"),
    ],
)
def test_wrong_flags_are_named(invoke: Invoke, tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    code, out, err = invoke("pack", tmp_path, "--out", tmp_path / "packed", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_other_folders_are_refused(invoke: Invoke, model: Path, command: str) -> None:
    code, out, err = invoke(command, model)
    assert code in (2, 4)
    assert out == ""
    assert err.splitlines()[-1].startswith(("error: ", "hint: "))

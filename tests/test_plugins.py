"""A format, a method, a layout, an export target and a data set from a folder outside of qcli are used like its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcli.cli.main import main
from qcli.data.datasets import read_text
from qcli.export.target import load_target
from qcli.utils import registry
from qcli.utils.errors import UsageError
from tests.plugins import PACKAGES, copy_plugins, registered
from tests.quantizing import logits, streamed
from tests.tiny import tiny_model

NAMES = {
    "formats": "ternary",
    "methods": "ternarize",
    "layouts": "bytewise",
    "targets": "bytewise",
    "sets": "products",
}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QCLI_CACHE", str(tmp_path / "cache"))
    with registered(tmp_path / "plugins"):
        yield


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    return out


@pytest.mark.slow
def test_every_command_uses_them(
    plugins: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, native, packed = tiny_model("llama", tmp_path), tmp_path / "native", tmp_path / "packed"
    text = ("--data", "products", "--samples", 4, "--seq-len", 32)
    options = ("--set", "method.threshold=0.5", "--device", "cpu")
    call(capsys, "quantize", model, "--method", "ternarize", *options, *text, "--out", native)
    recorded = json.loads((native / "qcli.manifest.json").read_text())
    assert recorded["recipe"]["method"] == {"name": "ternarize", "threshold": 0.5}
    assert recorded["calibration_text_identity"] == "products"
    assert {layer["measure"] for layer in recorded["layers"]} == {"output"}, "the text was read"

    loaded = AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32)
    assert loaded.model.layers[0].mlp.up_proj.format.name == "ternary"
    torch.testing.assert_close(logits(native), streamed(native), rtol=1e-4, atol=1e-4)

    result = json.loads(call(capsys, "pack", native, "--format", "bytewise", "--out", packed, "--json"))
    assert (result["format"], result["max_logit_difference"]) == ("bytewise", 0)
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["quant_method"] == "bytewise"
    assert torch.equal(streamed(packed), streamed(native))
    for folder, bits in ((native, 2), (packed, 8)):
        inspected = json.loads(call(capsys, "inspect", folder, "--json"))
        assert {layer["format"] for layer in inspected["layers"]} == {"ternary"}
        assert bits < inspected["bits_per_weight"] < bits + 1
        assert json.loads(call(capsys, "verify", folder, "--json"))["layers"] == 14
    scores = json.loads(call(capsys, "eval", packed, "--data", "products", "--window", 32, "--device", "cpu", "--json"))
    assert scores["perplexity"]["products"]["value"] > 1
    assert scores["fitted_to"] == [], "evaluation reads another slice"


def test_names_and_their_errors(plugins: None, tmp_path: Path) -> None:
    for kind, package in PACKAGES.items():
        assert NAMES[kind] in registry.names(package)
    assert read_text("products", calibration=True).startswith("0 times 1 is 0.\n1 times 2 is 2.")
    with pytest.raises(UsageError) as caught:
        read_text("product", calibration=True)
    assert caught.value.hint is not None and "did you mean 'products'?" in caught.value.hint
    with pytest.raises(UsageError, match="unknown export target 'bytewide'") as caught:
        load_target("bytewide", None)
    assert caught.value.hint is not None and "bytewise" in caught.value.hint


def test_nothing_is_left_of_them(tmp_path: Path) -> None:
    with registered(tmp_path / "plugins"):
        pass
    assert not any(NAMES[kind] in registry.names(package) for kind, package in PACKAGES.items())


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        (["quantize", "--help"], {"methods", "sets"}),
        (["pack", "--help"], {"targets"}),
        (["eval", "--help"], {"sets"}),
        (["recipe", "schema"], {"methods", "targets", "sets"}),
    ],
)
def test_help_and_schema_list_them(arguments: list[str], kinds: set[str], tmp_path: Path) -> None:
    """In a process of its own: help texts are made when the command line is imported."""
    copy_plugins(tmp_path / "plugins")
    script = (
        f"from pathlib import Path; from tests.plugins import register; register(Path({str(tmp_path / 'plugins')!r})); "
        f"from qcli.cli.main import main; main({arguments!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert run.returncode == 0, run.stderr
    for kind in kinds:
        assert NAMES[kind] in run.stdout

"""K-quants by llama.cpp: what it is given and what is made of its file; with llama.cpp itself where it is installed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qcli.cli.main import main
from qcli.export.gguf import llama_quantize
from qcli.export.inspect import inspect
from qcli.export.k_quants import pack_k_quants, plan_k_quants
from qcli.export.verify import verify
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.quantization.calibrate import calibrate
from qcli.recipe.load import load_recipe
from qcli.utils.errors import StateError, UnsupportedError, UsageError, VerificationError
from qcli.utils.run_folder import RunFolder
from tests.quantizing import run, write_text
from tests.tiny import tiny_model, with_merge

WIDE = {"hidden_size": 256, "intermediate_size": 512}  # rows of whole super-blocks
installed = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


def calibrated(model: Path, folder: Path) -> Path:
    """Statistics on a few tokens."""
    fields = {"model": str(model), "calibration.data": str(write_text(folder))}
    out = folder / f"{model.name}-statistics"
    calibrate(load_recipe(None, fields | {"calibration.samples": 4, "calibration.seq_len": 32}), out)
    return out


class Copying:
    """Stands for llama.cpp: copies the file, and notes what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.importance: dict[str, np.ndarray[Any, Any]] = {}
        self.type = ""
        monkeypatch.setattr(llama_quantize, "require", lambda: "0.0")
        monkeypatch.setattr(llama_quantize, "quantize", self)

    def __call__(self, file: Path, out: Path, type: str, importance: Mapping[str, Any], threads: int) -> None:
        self.type, self.importance = type, dict(importance)
        shutil.copy(file, out)


@pytest.mark.slow
def test_experts_have_importance_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no token came by, all inputs count alike."""
    model = with_merge(tiny_model("qwen3_moe", tmp_path, norm_topk_prob=True, num_local_experts=48))
    statistics, llama = calibrated(model, tmp_path), Copying(monkeypatch)
    result = pack_k_quants(str(model), tmp_path / "out", type="Q4_K_M", statistics=statistics)
    assert (result.rounded, result.max_logit_difference) == (0, 0)
    moments = load_file(statistics / "statistics.safetensors")
    assert len(llama.importance) == 2 * (4 + 3)
    layer = "model.layers.1.self_attn.o_proj"
    assert np.array_equal(llama.importance["blk.1.attn_output.weight"], moments[f"{layer}.second_moment"].numpy())
    own = [moments[f"model.layers.1.mlp.experts.{n}.down_proj.second_moment"].numpy() for n in range(48)]
    idle = [n for n in range(48) if not own[n].any()]
    assert 0 < len(idle) < 48
    for number, moment in enumerate(llama.importance["blk.1.ffn_down_exps.weight"].reshape(48, -1)):
        assert np.array_equal(moment, np.ones(len(moment)) if number in idle else own[number])


def test_the_result_is_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_merge(tiny_model("llama", tmp_path))
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    llama = Copying(monkeypatch)
    pack_k_quants(str(model), tmp_path / "out", type="Q4_K_M")
    assert (llama.type, llama.importance) == ("Q4_K_M", {})
    assert verify(tmp_path / "out").layers == 14
    assert "full-precision.gguf" not in {file.name for file in (tmp_path / "out").iterdir()}
    assert all(row["stored_as"] == "F32" and row["error"] == 0 for row in inspect(tmp_path / "out").layers)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.recipe == {"model": model.name, "method": {"name": "llama.cpp", "type": "Q4_K_M"}}
    assert manifest.source.fingerprint == open_source(str(model)).fingerprint()
    assert manifest.notes["importance"] == "none: all inputs count alike"
    assert manifest.layers[0].fallbacks == ["64 inputs are no multiple of 256: F32"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "logits differ from the model's by at most 0" in card and "type: Q4_K_M" in card
    assert manifest.source.license == {"license": "apache-2.0"} and 'license: "apache-2.0"' in card


def test_an_interrupted_run_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Copying(monkeypatch)
    with RunFolder(tmp_path / "out", {}, "auto") as interrupted:
        interrupted.commit("00000", {"x": torch.ones(3)})
    with pytest.raises(StateError, match=r"out\.partial holds an interrupted run"):
        pack_k_quants(str(with_merge(tiny_model("llama", tmp_path))), tmp_path / "out", type="Q4_K_M")
    assert interrupted.file("00000").exists()


def test_another_model_in_the_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaging(Copying):
        def __call__(self, file: Path, out: Path, type: str, importance: Mapping[str, Any], threads: int) -> None:
            super().__call__(file, out, type, importance, threads)
            tensor = next(t for t in gguf.GGUFReader(out, "r+").tensors if t.name == "blk.1.ffn_up.weight")
            tensor.data[:] = np.roll(tensor.data, 1, axis=0)

    Damaging(monkeypatch)
    model = with_merge(tiny_model("llama", tmp_path))
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj\.weight does not read back"):
        pack_k_quants(str(model), tmp_path / "out", type="Q4_K_M")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out*"))


def test_when_llama_cpp_fails_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_quantize, "require", lambda: "0.0")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UnsupportedError, match=r"llama\.cpp .* does not quantize .* to Q4_K_M: it ended with 1"):
        pack_k_quants(str(with_merge(tiny_model("llama", tmp_path))), tmp_path / "out", type="Q4_K_M")
    assert not list(tmp_path.glob("out*"))


def test_without_the_package_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(llama_quantize, "version", missing)
    model = with_merge(tiny_model("llama", tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["pack", str(model), "--format", "gguf", "--type", "q4_k_m", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert ended.value.code == 6
    assert "llama-cpp-python is not installed" in error and "pip install llama-cpp-python" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--type", "Q4_K_M"], "--type: format qcli has no K-quants"),
        (["--format", "gguf", "--type", "Q4_K_X"], "--type: no type 'Q4_K_X'"),
        (["--format", "gguf", "--statistics", "calibration"], "--statistics: importance is for K-quants alone"),
        (["--format", "gguf", "--type", "Q6_K", "--requantize", "Q8_0"], "--requantize: not with --type"),
        (["--format", "gguf", "--type", "Q6_K", "--allow-refused"], "--allow-refused: not with --type"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pack", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_is_given_must_be_a_model_and_its_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Copying(monkeypatch)
    model, other = with_merge(tiny_model("llama", tmp_path)), tiny_model("qwen2", tmp_path)
    run(model, tmp_path / "native", method__name="rtn")
    with pytest.raises(UsageError, match="is quantized: Q4_K_M rounds the weights of a model that is not") as raised:
        plan_k_quants(str(tmp_path / "native"), type="Q4_K_M")
    assert raised.value.hint is not None and model.name in raised.value.hint
    with pytest.raises(UsageError, match="is of another model, qwen2"):
        plan_k_quants(str(model), type="Q4_K_M", statistics=calibrated(other, tmp_path))
    with pytest.raises(UsageError, match="is not a folder written by `qcli calibrate`"):
        plan_k_quants(str(model), type="Q4_K_M", statistics=model)
    statistics = calibrated(model, tmp_path)
    moments = load_file(statistics / "statistics.safetensors")
    layer = "model.layers.1.self_attn.o_proj"
    save_file(
        {name: each for name, each in moments.items() if layer not in name}, statistics / "statistics.safetensors"
    )
    with pytest.raises(UsageError, match=f"has none of {layer}"):
        plan_k_quants(str(model), type="Q4_K_M", statistics=statistics)
    with pytest.raises(UnsupportedError, match="opt is not among") as refused:
        plan_k_quants(str(tiny_model("opt", tmp_path)), type="Q4_K_M")
    assert refused.value.hint == "quantize it with `qcli quantize`"


@installed
@pytest.mark.slow
def test_llama_cpp_uses_importance(tmp_path: Path) -> None:
    model = with_merge(tiny_model("qwen3_moe", tmp_path, norm_topk_prob=True, **WIDE, moe_intermediate_size=256))
    statistics = calibrated(model, tmp_path)
    moments = load_file(statistics / "statistics.safetensors")
    source = open_source(str(model))
    errors = []
    for name, given in (("alike", None), ("weighted", statistics)):
        result = pack_k_quants(str(model), tmp_path / name, type="Q3_K_S", statistics=given)
        assert result.notes["matrices"].startswith("31 Q3_K")
        written = open_source(str(tmp_path / name))
        assert verify(tmp_path / name).layers == 32
        errors.append(
            {
                layer: float(((source.read([key])[key] - written.read([key])[key]).square() @ moment).sum())
                for layer in (linear.name for linear in source.linears())
                if (moment := moments[f"{layer}.second_moment"]).any() and len(moment) == 256
                for key in [f"{layer}.weight"]
            }
        )
    alike, weighted = errors
    assert len(alike) > 20 and all(weighted[layer] < alike[layer] for layer in alike)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("type", llama_quantize.TYPES)
def test_llama_cpp_writes_every_type(type: str, tmp_path: Path) -> None:
    model = with_merge(tiny_model("gemma2", tmp_path, **WIDE))
    result = pack_k_quants(str(model), tmp_path / "out", type=type)
    assert type[:4] in result.notes["matrices"]
    assert torch.isfinite(torch.tensor(result.kl))

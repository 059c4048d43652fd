"""The calibration folder: its numbers against the whole model, its files, and its use as data."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.methods.rtn import RTN
from qcli.data.tokens import TokenRequest, calibration_tokens
from qcli.models import stream
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.calibrate import calibrate
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Calibration
from qcli.utils.errors import ResourceError, StateError, UsageError
from qcli.utils.sealed import digest
from tests.tiny import tiny_model

FAMILIES = ["llama", "gpt2", "falcon"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{n} times {n + 1} is {n * (n + 1)};" for n in range(80)))
    return str(file)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, the last one smaller."""
    monkeypatch.setattr(stream, "BATCH_TOKENS", 70)


def recipe(model: Path, text: str) -> Recipe:
    calibration = Calibration(data=text, samples=5, seq_len=32)
    return Recipe(model=str(model), seed=3, device="cpu", dtype="float32", calibration=calibration)


def seen_by_the_whole_model(folder: Path, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Inputs `[tokens, in_features]` of each layer, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in evaluation mode
    seen: dict[str, Tensor] = {}
    for name in names:

        def note(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].flatten(0, -2).double()

        model.get_submodule(name).register_forward_pre_hook(note)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_whole_model(family: str, tmp_path: Path, text: str) -> None:
    folder, out = tiny_model(family, tmp_path), tmp_path / "out"
    result = calibrate(recipe(folder, text), out, hessians=True)
    source = open_source(str(folder))
    linears = source.linears()
    ids = load_file(out / "tokens.safetensors")["ids"]
    assert torch.equal(ids, calibration_tokens(TokenRequest(text, samples=5, seq_len=32, seed=3), source).ids)
    inputs = seen_by_the_whole_model(folder, ids, [linear.name for linear in linears])
    statistics = load_file(out / "statistics.safetensors")
    hessians: dict[str, Tensor] = {}
    for file in sorted(out.glob("hessians-*.safetensors")):
        hessians |= load_file(file)

    assert list(result.layers) == [linear.name for linear in linears]
    assert statistics.keys() == {f"{linear.name}.{kind}" for linear in linears for kind in ("absmax", "second_moment")}

    def close(found: Tensor, direct: Tensor) -> None:
        torch.testing.assert_close(found.double(), direct, rtol=1e-4, atol=1e-5)

    for linear in linears:
        x = inputs[linear.name]
        close(statistics[f"{linear.name}.absmax"], x.abs().amax(0))
        close(statistics[f"{linear.name}.second_moment"], x.square().mean(0))
        if (hessian := hessians.pop(f"{linear.name}.hessian", None)) is not None:
            close(hessian, x.T @ x / len(x))
            assert torch.equal(hessian, hessian.T)
    assert not hessians


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivity_is_the_relative_error_of_rounding(family: str, tmp_path: Path, text: str) -> None:
    folder, out = tiny_model(family, tmp_path), tmp_path / "out"
    result = calibrate(recipe(folder, text), out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    statistics = load_file(out / "statistics.safetensors")
    for name, layer in result.layers.items():
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight").detach()
        weight = weight.T.contiguous() if isinstance(linear, Conv1D) else weight
        moment = statistics[f"{name}.second_moment"]
        assert list(layer.sensitivity) == [2, 3, 4]
        for bits, found in layer.sensitivity.items():
            rtn = RTN(bits=bits, group_size=64, group_tail="ragged")
            rounded = rtn.quantize(LinearGroup({"w": weight}))["w"].weight.dense()
            error = ((weight - rounded) ** 2 * moment).sum() / (weight**2 * moment).sum()
            assert found == pytest.approx(error.item(), rel=1e-4)
        assert layer.sensitivity[2] > layer.sensitivity[3] > layer.sensitivity[4] > 0


def test_dead_channels_are_counted(tmp_path: Path, text: str) -> None:
    folder = tiny_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:3] = 0
    model.save_pretrained(folder)
    layers = calibrate(recipe(folder, text), tmp_path / "out").layers
    dead = {name.removeprefix("model."): layer.dead_channels for name, layer in layers.items()}
    assert {name for name, count in dead.items() if count} == {f"layers.1.self_attn.{which}_proj" for which in "qkv"}
    assert dead["layers.1.self_attn.q_proj"] == 3


def test_the_folder_says_where_it_comes_from(tmp_path: Path, text: str) -> None:
    folder, out = tiny_model("llama", tmp_path), tmp_path / "out"
    result = calibrate(recipe(folder, text), out)
    record = json.loads((out / "calibration.json").read_text())
    assert record.pop("sha256") == digest(record)
    assert {"out": str(out), **record} == json.loads(json.dumps(result.to_json()))
    assert record["source_fingerprint"] == open_source(str(folder)).fingerprint()
    assert (record["data"], record["samples"], record["seq_len"], record["seed"]) == ("text.txt", 5, 32, 3)
    assert sorted(file.name for file in out.iterdir()) == [
        "calibration.json",
        "statistics.safetensors",
        "tokens.safetensors",
    ]
    again = calibration_tokens(TokenRequest(str(out), samples=1, seq_len=8, seed=0), open_source(str(folder)))
    assert again.sha256 == record["tokens_sha256"]


def test_twice_the_same_bytes_and_no_global_state(tmp_path: Path, text: str) -> None:
    folder = tiny_model("llama", tmp_path)
    before = torch.random.get_rng_state()
    for name in ("a", "b"):
        calibrate(recipe(folder, text), tmp_path / name, hessians=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_what_exists_is_kept(tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("mine")
    with pytest.raises(StateError, match="out exists"):
        calibrate(recipe(tiny_model("llama", tmp_path), text), out)
    assert (out / "file").read_text() == "mine"


def test_nothing_is_written_for_data_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UsageError, match="too short"):
        calibrate(recipe(tiny_model("llama", tmp_path), str(tmp_path / "short.txt")), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_killed_it_leaves_no_result_and_can_be_repeated(tmp_path: Path, text: str) -> None:
    folder, out = tiny_model("llama", tmp_path), tmp_path / "out"

    def killed(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "calibrate" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe(folder, text), out, killed)
    assert not out.exists()
    calibrate(recipe(folder, text), out)
    calibrate(recipe(folder, text), tmp_path / "straight")
    for file in (tmp_path / "straight").iterdir():
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_one_block_at_a_time_is_real(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most = []
    load_block = ModelStream.load_block

    def counted(self: ModelStream, index: int) -> nn.Module:
        block = load_block(self, index)
        alive.add(block)
        most.append(len(alive))
        return block

    monkeypatch.setattr(ModelStream, "load_block", counted)
    calibrate(recipe(tiny_model("llama", tmp_path, num_hidden_layers=4), text), tmp_path / "out")
    assert most == [1, 1, 1, 1]


def test_no_byte_depends_on_where_model_text_and_folder_are(text: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)
    calibrate(recipe(model, text), tmp_path / "out")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for path in (model, Path(text)):
        path.rename(elsewhere / path.name)
    calibrate(recipe(elsewhere / model.name, str(elsewhere / "text.txt")), elsewhere / "other")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {file.name: file.read_bytes() for file in (elsewhere / "other").iterdir()} == files
    assert not any(str(tmp_path).encode() in content for content in files.values())


def test_a_calibration_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    model = str(tiny_model("llama", tmp_path))
    recipe = Recipe(model=model, calibration=Calibration(data=text), max_memory="1MB")
    with pytest.raises(ResourceError, match="calibrating with this model needs .* --max-memory allows 1MB"):
        calibrate(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()

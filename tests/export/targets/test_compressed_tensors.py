"""compressed-tensors: its own package decodes the same weights; what the layout cannot store is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qcli.core.formats.affine import Affine
from qcli.core.weight import QuantizedWeight
from qcli.export.pack import pack, plan_pack
from qcli.export.targets import _vllm_rules
from qcli.export.targets._affine import affine_formats
from qcli.export.verify import verify
from qcli.models.families import Linear
from qcli.models.layouts import compressed_tensors as layout
from qcli.models.manifest import MANIFEST
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.utils.errors import UnsupportedError, VerificationError
from tests.quantizing import TOKENS, logits, run, streamed
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


def packed(model: Path, folder: Path, **flags: Any) -> tuple[Path, Path]:
    """A native checkpoint, and the same packed as compressed-tensors."""
    native, out = folder / "native", folder / "packed"
    run(model, native, method__name="rtn", **flags)
    pack(native, out, format="compressed-tensors", shard_size=10**9, allow_refused=True)
    return native, out


def load_with_transformers(folder: Path) -> Any:
    """The model as transformers and compressed-tensors load it, and its logits; the first pass decodes the weights."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model, model(TOKENS).logits


def assert_same_weights(native: Path, model: Any, dtype: torch.dtype) -> None:
    source = open_source(str(native))
    for name in (linear.name for linear in source.linears()):
        expected = source.read([f"{name}.weight"])[f"{name}.weight"].to(dtype).float()
        assert torch.equal(model.get_submodule(name).weight.float(), expected), name


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.usefixtures("exact_layers")
def test_symmetric_weights_and_logits_are_equal(bits: int, llama: Path, tmp_path: Path) -> None:
    native, out = packed(llama, tmp_path, method__bits=bits, method__symmetric=True)
    model, actual = load_with_transformers(out)
    assert_same_weights(native, model, torch.float32)
    assert torch.equal(actual, logits(native))


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_weights_differ_by_one_rounding(bits: int, llama: Path, tmp_path: Path) -> None:
    """transformers decodes in the dtype of the scales, float16."""
    native, out = packed(llama, tmp_path, method__bits=bits)
    model, actual = load_with_transformers(out)
    assert_same_weights(native, model, torch.float16)
    assert torch.allclose(actual, logits(native), atol=0.02)


@pytest.mark.usefixtures("exact_layers")
def test_each_scheme_has_its_config_group(llama: Path, tmp_path: Path) -> None:
    overrides = [
        {"match": "*.layers.1.mlp.*", "method": {"bits": 3, "group_size": 64}},
        {"match": "*.down_proj", "method": {"group_size": -1}},
        {"match": "*.layers.0.self_attn.*", "dense": True},
    ]
    native, out = packed(llama, tmp_path, method__symmetric=True, overrides=overrides)
    model, actual = load_with_transformers(out)
    assert_same_weights(native, model, torch.float32)
    assert torch.equal(actual, logits(native))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 3
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]


@pytest.mark.parametrize("other", [{"bits": 3}, {"group_size": 64}, {"symmetric": True}])
def test_transformers_refuses_what_it_would_decode_wrongly(other: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    _, out = packed(llama, tmp_path, overrides=[{"match": "*.down_proj", "method": other}])
    with pytest.raises(RuntimeError, match="mismatch"):
        load_with_transformers(out)
    card = (out / "README.md").read_text()
    assert "| transformers | does not load it: asymmetric layers beside layers of another format |" in card


@pytest.mark.parametrize(
    ("flags", "refused", "fitting", "loads"),
    [
        ({"method__bits": 3}, ["vLLM"], "--symmetric or --bits 4", "from_pretrained"),
        (
            {"overrides": [{"match": "*.down_proj", "method": {"group_size": 64}}]},
            ["transformers"],
            "--symmetric",
            "vllm serve",
        ),
        (
            {"method__bits": 3, "overrides": [{"match": "*.down_proj", "method": {"bits": 4}}]},
            ["vLLM", "transformers"],
            "--symmetric",
            "Does not load in vLLM and transformers",
        ),
    ],
)
def test_what_an_engine_refuses_is_packed_only_on_request(
    flags: dict[str, Any], refused: list[str], fitting: str, loads: str, llama: Path, tmp_path: Path
) -> None:
    native, out = tmp_path / "native", tmp_path / "packed"
    run(llama, native, method__name="rtn", **flags)
    for attempt in (
        lambda: plan_pack(native, format="compressed-tensors"),
        lambda: pack(native, out, format="compressed-tensors", shard_size=10**9),
    ):
        with pytest.raises(UnsupportedError) as raised:
            attempt()
        lines = raised.value.message.splitlines()
        assert [line.split(" does not load this as compressed-tensors: ")[0] for line in lines] == refused
        hint = raised.value.hint or ""
        assert hint.startswith(f"quantize with {fitting}; or pack it as qcli or dense; --allow-refused")
        assert [path.name for path in tmp_path.iterdir()] == ["native"]
    result = pack(native, out, format="compressed-tensors", shard_size=10**9, allow_refused=True)
    assert plan_pack(native, format="compressed-tensors", allow_refused=True).notes == result.notes
    card = (out / "README.md").read_text()
    assert loads in card and f"Does not load in {' and '.join(refused)}" in card
    for engine, command in (("vLLM", "vllm serve"), ("transformers", '"DIR", dtype="float16"')):
        assert (command in card) != (engine in refused)


def test_qcli_opens_the_packed_folder(llama: Path, tmp_path: Path) -> None:
    native, out = packed(llama, tmp_path, method__bits=3)
    assert torch.equal(streamed(out), streamed(native))
    assert verify(out).layers == 14
    assert open_source(str(out)).bits_per_weight() > open_source(str(native)).bits_per_weight(), "weight_shape counts"


def test_layout_by_hand() -> None:
    """Eleven codes of three bits: the octal digits of a word, the eleventh code's low bits in its two top bits."""
    row = [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    first, second = 0o32107654321 - (1 << 32), 0
    codes = torch.tensor([row] * 11, dtype=torch.uint8)
    tables = {
        "weight_scale": torch.full((11, 1), 0.5, dtype=torch.float16),
        "weight_zero_point": torch.tensor(row, dtype=torch.uint8)[:, None],
    }
    weight = QuantizedWeight(Affine(bits=3, group_size=11, zero_point="integer"), (11, 11), codes, tables)
    tensors = layout.tensors("layer", weight)
    assert tensors["layer.weight_packed"].tolist() == [[first, second]] * 11
    assert tensors["layer.weight_zero_point"].tolist() == [[first], [second]]
    assert tensors["layer.weight_shape"].tolist() == [11, 11]
    assert tensors["layer.weight_scale"].shape == (11, 1)
    unpacked = unpack_from_int32(tensors["layer.weight_packed"], 3, torch.Size([11, 11]))
    assert torch.equal(unpacked + 4, codes.to(torch.int8))


# Eleven codes 7 i + 3 modulo 2^bits as 32-bit words, little end first; written by hand, not by either packer.
GOLDEN = {
    2: [0x001B1B1B],
    3: [0x53977053, 0x0],
    4: [0x4D6F81A3, 0x92B],
    5: [0x4DFC4543, 0x245BA3],
    6: [0x9F611283, 0x90BBD2D9, 0x0],
    7: [0xF3044503, 0x3B68B531, 0x1261],
    8: [0x18110A03, 0x342D261F, 0x49423B],
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_words_of_every_width(bits: int) -> None:
    """Codes packed along a row, zero points along a column, by qcli and by the package."""
    words = torch.tensor(GOLDEN[bits]).to(torch.int32)
    codes = (torch.arange(11) * 7 + 3).remainder(1 << bits).to(torch.uint8)
    tables = {"weight_scale": torch.ones(11, 1, dtype=torch.float16), "weight_zero_point": codes[:, None]}
    format = Affine(bits=bits, group_size=-1, zero_point="integer")
    tensors = layout.tensors("layer", QuantizedWeight(format, (11, 11), codes.repeat(11, 1), tables))
    assert torch.equal(tensors["layer.weight_packed"], words.repeat(11, 1))
    assert torch.equal(tensors["layer.weight_zero_point"], words[:, None])
    signed = (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(pack_to_int32(signed[None], bits), words[None])
    assert torch.equal(pack_to_int32(signed[:, None], bits, packed_dim=0), words[:, None])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method__name": "lcq", "method__steps": 0}, "is codebook, compressed-tensors stores only uniform grids"),
        ({"low_rank__rank": 2}, "is low-rank"),
        ({"method__zero_point": "float"}, "floating-point zero points"),
        ({"method__group_size": 48, "method__group_tail": "ragged"}, "64 inputs in groups of 48"),
        ({"activations__bits": 8}, "quantizes activations to 8 bits"),
        ({"overrides": [{"match": "*.k_proj", "method": {"bits": 3}}]}, "q_proj is 4 bits .*k_proj is 3 bits"),
        ({"overrides": [{"match": "*.up_proj", "dense": True}]}, "gate_proj is 4 bits .*up_proj is dense"),
        ({"overrides": [{"match": "*.gate_proj", "method": {"bits": 3}}]}, "gate_proj is 3 bits .*up_proj is 4 bits"),
        (
            {"overrides": [{"match": "*.v_proj", "method": {"symmetric": True}}]},
            "q_proj is 4 bits asymmetric in groups of 32, .*v_proj is 4 bits symmetric in groups of 32",
        ),
        (
            {"overrides": [{"match": "*.1.*.q_proj", "method": {"group_size": 64}}]},
            "layers.1.self_attn.q_proj is 4 bits asymmetric in groups of 64, .*k_proj .* in groups of 32",
        ),
    ],
)
def test_layers_the_layout_cannot_store_are_refused(
    flags: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little grid. " * 200)
    run(llama, tmp_path / "native", text, **{"method__name": "rtn", **flags})
    with pytest.raises(UnsupportedError, match=message) as raised:
        pack(tmp_path / "native", tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    assert raised.value.hint is not None and "pack it as qcli" in raised.value.hint
    assert [path.name for path in tmp_path.iterdir() if "packed" in path.name] == []


NAMES = {
    "transformers": ("model.language_model.layers.{}.", "model.vision_tower.encoder.layers.0.", "lm_head"),
    "vLLM": (
        "language_model.model.layers.{}.",
        "vision_tower.vision_model.encoder.layers.0.",
        "language_model.lm_head",
    ),
}


@pytest.mark.parametrize("engine", NAMES)
def test_targets_of_a_multimodal_model_match_as_every_engine_names_its_modules(engine: str, tmp_path: Path) -> None:
    """vLLM's names are those of gemma3_mm.py; it refuses modules that are neither a target nor ignored."""
    overrides = [{"match": "*.layers.1.mlp.*", "dense": True}]
    _, out = packed(tiny_model("gemma3", tmp_path), tmp_path, method__symmetric=True, overrides=overrides)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]

    def found(name: str, patterns: list[str]) -> bool:
        return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)

    block, vision, head = NAMES[engine]
    quantized = [
        block.format(0) + "self_attn.q_proj",
        block.format(0) + "mlp.down_proj",
        block.format(1) + "self_attn.o_proj",
    ]
    dense = [block.format(1) + "mlp.down_proj", vision + "self_attn.q_proj", vision + "mlp.fc1", head]
    assert all(found(name, targets) and not found(name, config["ignore"]) for name in quantized)
    assert all(found(name, config["ignore"]) and not found(name, targets) for name in dense)


def test_a_multimodal_model_is_refused_where_dense_layers_have_no_names(tmp_path: Path) -> None:
    run(tiny_model("gemma3", tmp_path), tmp_path / "native", method__name="rtn", method__symmetric=True)
    for format in ("gptq", "awq"):
        with pytest.raises(UnsupportedError, match=f"{format} cannot say that model.vision_tower is dense"):
            pack(tmp_path / "native", tmp_path / "packed", format=format, shard_size=10**9)


def test_conv1d_models_are_refused(tmp_path: Path) -> None:
    run(tiny_model("gpt2", tmp_path), tmp_path / "native", method__name="rtn")
    for format in ("compressed-tensors", "gptq", "awq"):
        with pytest.raises(UnsupportedError, match=rf"no nn\.Linear layers, the only ones that {format} packs"):
            pack(tmp_path / "native", tmp_path / "packed", format=format, shard_size=10**9)


@pytest.mark.parametrize(
    ("shape", "format", "splits_inputs", "ranks", "reason"),
    [
        ((64, 64), Affine(bits=3, group_size=32, zero_point="none"), False, 1, None),
        ((64, 64), Affine(bits=3, group_size=32, zero_point="integer"), False, 1, "3 bits asymmetric"),
        ((64, 64), Affine(bits=1, group_size=32, zero_point="none"), False, 1, "1 bits symmetric"),
        ((64, 128), Affine(bits=4, group_size=32, zero_point="none"), True, 4, None),
        ((64, 128), Affine(bits=4, group_size=32, zero_point="none"), True, 8, "16 inputs a device, groups of 32"),
        ((64, 128), Affine(bits=4, group_size=-1, zero_point="none"), True, 8, None),
        ((64, 48), Affine(bits=4, group_size=12, zero_point="none"), True, 4, "12 inputs a device are no whole words"),
        ((24, 64), Affine(bits=4, group_size=32, zero_point="integer"), False, 2, "zero points of 12 outputs"),
        ((24, 64), Affine(bits=4, group_size=32, zero_point="none"), False, 2, None),
        ((30, 64), Affine(bits=4, group_size=32, zero_point="none"), False, 4, "30 outputs"),
    ],
)
def test_vllm_rules(
    shape: tuple[int, int], format: Affine, splits_inputs: bool, ranks: int, reason: str | None
) -> None:
    misfit = _vllm_rules._misfit(Linear("layer", 0, 0, shape), format, splits_inputs, ranks)
    assert misfit == reason or (misfit is not None and reason is not None and misfit.startswith(reason))


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ({"method__group_size": 8, "method__symmetric": True}, "1, 2, 4, 8"),
        ({"method__group_size": 8}, "1, 2, 4, 8"),
        ({"method__group_size": -1, "method__symmetric": True}, "1, 2, 4, 8"),
        ({"method__group_size": 16, "method__symmetric": True}, "1, 2, 4"),
        ({"method__group_size": 32}, "1, 2"),
        ({"method__group_size": 8, "method__symmetric": True, "method__bits": 3}, "1, 2"),
        ({"method__group_size": 8, "method__symmetric": True, "method__bits": 2}, "1, 2, 4"),
        ({"method__group_size": 8, "method__bits": 3}, None),
    ],
)
def test_tensor_parallel_sizes_that_vllm_allows(flags: dict[str, Any], ranks: str | None, tmp_path: Path) -> None:
    """8 heads of 8 and 2 key/value heads, which 4 and 8 devices replicate; an MLP of 128."""
    model = tiny_model("llama", tmp_path, num_attention_heads=8, num_key_value_heads=2)
    run(model, tmp_path / "native", method__name="rtn", **flags)
    source = open_source(str(tmp_path / "native"))
    assert isinstance(source, NativeSource)
    formats = affine_formats(source, "compressed-tensors")
    refusal = _vllm_rules.refusal(source, formats)
    if ranks is None:
        assert refusal == ("model.layers.0.self_attn.q_proj has 3 bits asymmetric", ("--symmetric", "--bits 4"))
    else:
        assert refusal is None
        described = _vllm_rules.describe(source, formats)
        assert described.split("; ")[0] == f"by its rules with tensor parallel {ranks}"


def test_result_describes_vllm_support(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "native", method__name="rtn", method__symmetric=True)
    result = pack(tmp_path / "native", tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    described = result.notes["vLLM"]
    assert described.startswith("by its rules with tensor parallel 1, 2; 4 not: "), described
    assert described.endswith("; outside of what its Marlin kernels take, so slower"), "k_proj has 32 rows"


def test_layers_that_marlin_supports_are_not_called_slow(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path, hidden_size=128, num_key_value_heads=4)
    run(model, tmp_path / "native", method__name="rtn", method__symmetric=True)
    source = open_source(str(tmp_path / "native"))
    assert isinstance(source, NativeSource)
    described = _vllm_rules.describe(source, affine_formats(source, "compressed-tensors"))
    assert described == "by its rules with tensor parallel 1, 2, 4; 8 not: 4 heads, 4 of them for keys and values"


SMALL_FLOATS: dict[str, dict[str, Any]] = {
    "fp8": {"method__name": "fp8"},
    "fp8, inputs too": {"method__name": "fp8", "activations__type": "float"},
    "nvfp4": {"method__name": "nvfp4"},
    "fp8 beside integers": {
        "method__name": "fp8",
        "overrides": [{"match": "*.mlp.*", "method": {"name": "rtn", "bits": 4, "group_size": 32, "symmetric": True}}],
    },
}


@pytest.mark.parametrize("name", SMALL_FLOATS)
@pytest.mark.usefixtures("exact_layers")
def test_small_floats_are_what_transformers_computes_with(name: str, llama: Path, tmp_path: Path) -> None:
    """In float32 and in bfloat16: scales and weights are exact in both."""
    native, out, foreign = tmp_path / "native", tmp_path / "packed", tmp_path / "foreign"
    run(llama, native, grouped=False, **SMALL_FLOATS[name])
    result = pack(native, out, format="compressed-tensors", shard_size=10**9)
    assert result.proof.engine is not None and result.max_logit_difference == 0
    model, actual = load_with_transformers(out)
    assert torch.equal(actual, logits(native))
    assert_same_weights(native, model, torch.float32)
    if "integers" not in name:  # whose scales are float16
        half = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).eval()
        half(TOKENS)
        assert_same_weights(native, half, torch.bfloat16)
    assert 'dtype="bfloat16"' in (out / "README.md").read_text(), "scales of fp8 may be out of float16's range"
    assert torch.equal(streamed(out), streamed(native))
    assert verify(out).layers == 14
    shutil.copytree(out, foreign, ignore=shutil.ignore_patterns(MANIFEST))  # as other software would leave it
    read, source = open_source(str(foreign)), open_source(str(native))
    for layer in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        expected = source.read([layer])[layer]
        torch.testing.assert_close(read.read([layer])[layer].float(), expected, rtol=2**-8, atol=0)


def test_layers_that_engines_fuse_get_one_divisor(tmp_path: Path) -> None:
    """vLLM multiplies all of them by the largest; the weights stay as they are."""
    model = tiny_model("llama", tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 5
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e4
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    native, out = tmp_path / "native", tmp_path / "packed"
    run(model, native, method__name="nvfp4", grouped=False, overrides=[{"match": "*.1.mlp.*", "dense": True}])
    pack(native, out, format="compressed-tensors", shard_size=10**9)
    stored = load_file(out / "model.safetensors")
    divisors = [float(stored[f"model.layers.0.self_attn.{which}_proj.weight_global_scale"]) for which in "qkvo"]
    assert divisors[0] == divisors[1] == divisors[2] < divisors[3]
    run(model, tmp_path / "wide", method__name="nvfp4", grouped=False)
    with pytest.raises(UnsupportedError, match=r"1.mlp.gate_proj has scales that are too small beside those"):
        pack(tmp_path / "wide", tmp_path / "no", format="compressed-tensors", shard_size=10**9)


def test_inputs_are_fp8_where_all_weights_are(llama: Path, tmp_path: Path) -> None:
    grid = {"match": "*.mlp.*", "method": {"name": "rtn", "bits": 4, "group_size": 32}}
    run(llama, tmp_path / "mixed", method__name="fp8", grouped=False, activations__type="float", overrides=[grid])
    with pytest.raises(UnsupportedError, match="quantizes activations to 8 bits") as raised:
        pack(tmp_path / "mixed", tmp_path / "no", format="compressed-tensors", shard_size=10**9)
    assert "method fp8 with activations of type float" in str(raised.value.hint)
    run(llama, tmp_path / "native", method__name="fp8", grouped=False, activations__type="float")
    out = tmp_path / "packed"
    pack(tmp_path / "native", out, format="compressed-tensors", shard_size=10**9)
    config = json.loads((out / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"], inputs["num_bits"], inputs["type"]) == ("token", True, 8, "float")
    group["input_activations"] = inputs | {"dynamic": False}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="quantization_config is not understood"):
        open_source(str(out))


def test_nvfp4_beside_other_formats_is_for_vllm_alone(llama: Path, tmp_path: Path) -> None:
    native = tmp_path / "native"
    overrides = [{"match": "*.mlp.*", "method": {"name": "fp8"}}]
    run(llama, native, method__name="nvfp4", grouped=False, overrides=overrides)
    with pytest.raises(UnsupportedError, match="transformers does not load this .* nvfp4 beside layers of another"):
        pack(native, tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    out = tmp_path / "packed"
    pack(native, out, format="compressed-tensors", shard_size=10**9, allow_refused=True)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = {group["format"]: group["weights"]["strategy"] for group in config["config_groups"].values()}
    assert config["format"] == "mixed-precision"
    assert groups == {"nvfp4-pack-quantized": "tensor_group", "float-quantized": "channel"}


@pytest.mark.parametrize("part", ["weight_packed", "weight_global_scale"])
def test_missing_parts_of_small_floats_are_noticed(part: str, llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "native", method__name="nvfp4", grouped=False)
    pack(tmp_path / "native", tmp_path / "packed", format="compressed-tensors", shard_size=10**9)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VerificationError, match=rf"no (tensor|matrix) model\.layers\.0\.mlp\.up_proj\.{part}"):
        open_source(str(tmp_path / "packed"))

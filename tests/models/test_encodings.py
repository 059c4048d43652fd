"""Weights that other software quantized: decoded as that software decodes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcli.models.derived import read
from qcli.models.encoding import Encoding
from qcli.models.encodings.auto_round import AutoRound
from qcli.models.encodings.awq import AWQ
from qcli.models.encodings.bitsandbytes import BitsAndBytes
from qcli.models.encodings.compressed_tensors import CompressedTensors
from qcli.models.encodings.fbgemm_fp8 import FbgemmFP8
from qcli.models.encodings.fp8 import FP8
from qcli.models.encodings.gptq import GPTQ
from qcli.models.encodings.modelopt import ModelOpt
from qcli.models.encodings.mxfp4 import MXFP4
from qcli.models.encodings.mxfp8 import MXFP8
from qcli.utils.errors import UnsupportedError, UsageError
from qcli.utils.safetensors import read_header

ROWS, COLUMNS = 48, 64


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator())


def decoded(encoding: Encoding, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What a file with these tensors is read as."""
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    found = encoding.decoded(read_header(file))
    read_all = {name: read(tensor) for name, tensor in found.items()}
    for name, tensor in read_all.items():
        assert found[name].stored.shape == tensor.shape
        assert found[name].stored.torch_dtype == tensor.dtype
    return read_all


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of each row as a little-endian bit stream in 32-bit words, bit by bit."""
    words = torch.zeros(len(codes), -(-codes.shape[1] * bits // 32), dtype=torch.int64)
    for column in range(codes.shape[1]):
        for bit in range(bits):
            place = column * bits + bit
            words[:, place // 32] |= (codes[:, column].long() >> bit & 1) << place % 32
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_decoded_as_transformers_does(scales: torch.dtype, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = values(256, 384).to(torch.float8_e4m3fn)
    scale = values(2, 3).to(scales)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    encoding = FP8({"weight_block_size": [128, 128]}, "BF16")
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "a.input_scale": values(1), "norm.weight": values(4)}
    actual = decoded(encoding, tensors, tmp_path)
    assert actual.keys() == {"a.weight", "norm.weight"}
    assert torch.equal(actual["a.weight"], expected)


def test_fp8_blocks_that_the_matrix_does_not_fill(tmp_path: Path) -> None:
    weight, scale = values(200, 300).to(torch.float8_e4m3fn), values(2, 3)
    spread = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    encoding = FP8({"weight_block_size": [128, 128]}, "F32")
    actual = decoded(encoding, {"a.weight": weight, "a.weight_scale_inv": scale}, tmp_path)
    assert torch.equal(actual["a.weight"], weight.float() * spread)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_one_scale(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = values(ROWS, COLUMNS).to(torch.float8_e5m2), torch.full(shape, 0.3)
    actual = decoded(FP8({}, "F32"), {"a.weight": weight, "a.weight_scale_inv": scale}, tmp_path)
    assert torch.equal(actual["a.weight"], weight.float() * 0.3)


def test_fp4_experts_with_exponents_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = integers(-128, 128, ROWS, 32).to(torch.int8), integers(120, 130, ROWS, 2).to(torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    for stored in (scale, scale.view(torch.float8_e8m0fnu)):
        encoding = FP8({"weight_block_size": [128, 128]}, "BF16")
        actual = decoded(encoding, {"a.weight": weight, "a.weight_scale_inv": stored}, tmp_path)
        assert torch.equal(actual["a.weight"], expected)


def test_one_expert_of_an_fp8_stack_is_read_alone(tmp_path: Path) -> None:
    weight, scale = values(3, 128, 256).to(torch.float8_e4m3fn), values(3, 1, 2)
    save_file({"e.gate_up_proj": weight, "e.gate_up_proj_scale_inv": scale}, tmp_path / "model.safetensors")
    stack = FP8({"weight_block_size": [128, 128]}, "F32").decoded(read_header(tmp_path / "model.safetensors"))
    one = stack["e.gate_up_proj"].item(1)
    assert one.bytes == 128 * 256 + 2 * 4
    assert torch.equal(read(one), read(stack["e.gate_up_proj"])[1])
    assert torch.equal(read(one), weight[1].float() * scale[1].repeat_interleave(128, 1))


def test_mxfp4_is_decoded_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = integers(0, 256, 3, 8, 2, 16).to(torch.uint8)
    scales = integers(110, 135, 3, 8, 2).to(torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales)
    actual = decoded(MXFP4({}, "BF16"), {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}, tmp_path)
    assert actual.keys() == {"e.down_proj"}
    assert torch.equal(actual["e.down_proj"], expected)
    stack = MXFP4({}, "BF16").decoded(read_header(tmp_path / "model.safetensors"))["e.down_proj"]
    assert torch.equal(read(stack.item(2)), expected[2])
    assert stack.item(2).bytes == stack.bytes // 3


def test_mxfp8_is_decoded_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = values(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    scale = integers(120, 130, ROWS, COLUMNS // 32).to(torch.uint8)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    encoding = MXFP8({"weight_block_size": [1, 32]}, "BF16")
    actual = decoded(encoding, {"a.weight": weight, "a.weight_scale_inv": scale}, tmp_path)
    assert torch.equal(actual["a.weight"], expected)
    assert encoding.description == "mxfp8 in blocks of 1 x 32"


@pytest.mark.parametrize("scale", [(), (1,), (ROWS,), (ROWS, 1), (3, 2), (3, 1, 2, 1)])
def test_fp8_of_modelopt(scale: tuple[int, ...], tmp_path: Path) -> None:
    weight, scales = values(ROWS, COLUMNS).to(torch.float8_e4m3fn), values(*scale)
    tensors = {"a.weight": weight, "a.weight_scale": scales, "a.input_scale": torch.tensor(1.0)}
    actual = decoded(ModelOpt({"quant_algo": "FP8"}, "F32"), tensors, tmp_path)
    assert actual.keys() == {"a.weight"}
    grid = scales.reshape(3, 2) if len(scale) > 1 and scale[0] == 3 else scales.reshape(-1, 1)
    spread = grid.repeat_interleave(ROWS // len(grid), 0).repeat_interleave(COLUMNS // grid.shape[1], 1)
    assert torch.equal(actual["a.weight"], weight.float() * spread)


def test_nvfp4_of_modelopt_is_that_of_compressed_tensors(tmp_path: Path) -> None:
    """The same codes, with the outer scale turned round."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    packed = integers(0, 256, ROWS, COLUMNS // 2).to(torch.uint8)
    scale, outer = values(ROWS, COLUMNS // 16).to(torch.float8_e4m3fn), torch.tensor(0.37)
    tensors = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": outer}
    actual = decoded(ModelOpt({"quant_algo": "NVFP4"}, "F32"), tensors, tmp_path)["a.weight"]
    unpacked = unpack_fp4_from_uint8(packed, ROWS, COLUMNS).float()
    assert torch.equal(actual, unpacked * (scale.float() * outer).repeat_interleave(16, 1))


def test_fbgemm_has_scales_by_row(tmp_path: Path) -> None:
    weight, scale = values(ROWS, COLUMNS).to(torch.float8_e4m3fn), values(ROWS, 1)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale_ub": torch.tensor([1200.0])}
    actual = decoded(FbgemmFP8({}, "F32"), tensors, tmp_path)
    assert actual.keys() == {"a.weight"}
    assert torch.equal(actual["a.weight"], weight.float() * scale)


SCHEMES: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": True},
    "pack-quantized asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False},
    "pack-quantized channel": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "pack-quantized 3 bits": {"num_bits": 3, "strategy": "channel", "symmetric": False},
    "int-quantized": {"num_bits": 8, "strategy": "channel", "symmetric": True},
    "int-quantized asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "int-quantized tensor": {"num_bits": 8, "strategy": "tensor", "symmetric": True},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "float-quantized tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
    "float-quantized block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    "nvfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    "mxfp4-pack-quantized": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_are_decoded_as_that_package_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    fields = SCHEMES[name]
    args = QuantizationArgs(**fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(name.split()[0])
    state: dict[str, Tensor] = {"weight": values(ROWS, COLUMNS)}
    state["weight_scale"] = scales_of(state["weight"], fields)
    if fields["strategy"] == "tensor_group":
        state["weight_global_scale"] = torch.tensor([37.5])
        state["weight_scale"] = (state["weight_scale"] * 37.5).to(torch.float8_e4m3fn).float()
    if not fields.get("symmetric", True):
        half = 1 << (fields["num_bits"] - 1)
        state["weight_zero_point"] = integers(-half, half, *state["weight_scale"].shape).to(torch.int8)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    config = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}}
    tensors = {f"a.{part}": tensor.detach() for part, tensor in stored.items()}
    actual = decoded(CompressedTensors(config, "F32"), tensors, tmp_path)
    assert actual.keys() == {"a.weight"}
    assert torch.equal(actual["a.weight"].to(expected.dtype), expected)


def scales_of(weight: Tensor, fields: dict[str, Any]) -> Tensor:
    levels = 4.0 if fields.get("type") == "float" else float(1 << (fields["num_bits"] - 1))
    match fields["strategy"]:
        case "tensor":
            scale = weight.abs().amax().reshape(1)
        case "channel":
            scale = weight.abs().amax(1, keepdim=True)
        case "block":
            height, width = fields["block_structure"]
            scale = weight.view(ROWS // height, height, COLUMNS // width, width).abs().amax((1, 3))
        case _:
            scale = weight.view(ROWS, -1, fields["group_size"]).abs().amax(2)
    if fields.get("group_size") == 32:
        return torch.exp2(torch.floor(torch.log2(scale)))
    return (scale / levels).bfloat16().float()


def test_compressed_tensors_in_any_order_of_columns(tmp_path: Path) -> None:
    codes, scales = integers(0, 16, ROWS, COLUMNS), values(ROWS, 4)
    groups = integers(0, 4, COLUMNS).int()
    weights = {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": True, "actorder": "group"}
    config = {"config_groups": {"g": {"targets": [r"re:.*a$"], "weights": weights}}}
    tensors = {"x.a.weight_packed": pack(codes, 4), "x.a.weight_scale": scales, "x.a.weight_g_idx": groups}
    tensors["x.a.weight_shape"] = torch.tensor([ROWS, COLUMNS])
    actual = decoded(CompressedTensors(config, "F32"), tensors, tmp_path)["x.a.weight"]
    assert torch.equal(actual, (codes - 8) * scales[:, groups.long()])


def test_the_group_that_names_a_layer_most_closely_counts(tmp_path: Path) -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "channel", "symmetric": True}}

    groups = {"a": group(8, "Linear"), "b": group(4, r"re:.*down_proj"), "c": group(2, "l.0.down_proj")}
    tensors: dict[str, Tensor] = {}
    for name, bits in (("l.0.up_proj", 8), ("l.1.down_proj", 4), ("l.0.down_proj", 2)):
        tensors[f"{name}.weight_packed"] = pack(torch.full((ROWS, COLUMNS), (1 << bits) - 1), bits)
        tensors[f"{name}.weight_scale"] = torch.ones(ROWS, 1)
        tensors[f"{name}.weight_shape"] = torch.tensor([ROWS, COLUMNS])
    actual = decoded(CompressedTensors({"config_groups": groups}, "F32"), tensors, tmp_path)
    assert {name: tensor[0, 0].item() for name, tensor in actual.items()} == {
        "l.0.up_proj.weight": 127,
        "l.1.down_proj.weight": 7,
        "l.0.down_proj.weight": 1,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_is_the_formula_of_its_paper(bits: int, version: str, tmp_path: Path) -> None:
    codes, zeros = integers(0, 1 << bits, COLUMNS, ROWS), integers(0, (1 << bits) - 1, 4, 32)
    codes, scales = codes[:, :32], values(4, 32).half()
    groups = integers(0, 4, COLUMNS).int()
    tensors = {
        "a.qweight": pack(codes.T, bits).T,
        "a.qzeros": pack(zeros, bits),
        "a.scales": scales,
        "a.g_idx": groups,
        "a.bias": values(32),
    }
    actual = decoded(GPTQ({"bits": bits, "group_size": 16, "checkpoint_format": version}, "BF16"), tensors, tmp_path)
    assert actual.keys() == {"a.weight", "a.bias"}
    for out, inp in ((0, 0), (31, 63), (7, 30), (16, 31)):
        group = int(groups[inp])
        zero = zeros[group, out] + (1 if version == "gptq" else 0)
        assert actual["a.weight"][out, inp] == ((codes[inp, out] - zero).half() * scales[group, out])
    assert actual["a.weight"].dtype == torch.float16


def test_gptq_without_the_order_of_columns(tmp_path: Path) -> None:
    codes, scales = integers(0, 16, COLUMNS, 32), values(4, 32).half()
    tensors = {"a.qweight": pack(codes.T, 4).T, "a.qzeros": pack(torch.full((4, 32), 7), 4), "a.scales": scales}
    actual = decoded(GPTQ({"bits": 4, "group_size": 16}, "BF16"), tensors, tmp_path)["a.weight"]
    assert torch.equal(actual, ((codes - 8).half() * scales.repeat_interleave(16, 0)).T)


@pytest.mark.parametrize(("layout", "offset"), [("auto_round:auto_gptq", 1), ("auto_round", 0)])
def test_auto_round_in_the_layout_of_gptq(layout: str, offset: int, tmp_path: Path) -> None:
    codes, zeros, scales = integers(0, 256, COLUMNS, 32), integers(0, 200, 4, 32), values(4, 32).half()
    tensors = {"a.qweight": pack(codes.T, 8).T, "a.qzeros": pack(zeros, 8), "a.scales": scales}
    config = {"bits": 4, "group_size": 16, "packing_format": layout}  # the layer has bits of its own
    actual = decoded(AutoRound(config, "BF16"), tensors, tmp_path)["a.weight"]
    spread = [table.repeat_interleave(16, 0) for table in (zeros + offset, scales)]
    assert torch.equal(actual, ((codes - spread[0]).float() * spread[1].float()).half().T)


def test_awq_is_decoded_in_its_order_of_outputs(tmp_path: Path) -> None:
    codes, zeros, scales = integers(0, 16, COLUMNS, 32), integers(0, 16, 4, 32), values(4, 32).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ packs outputs in this order, the first into the lowest bits

    def packed(matrix: Tensor) -> Tensor:
        return pack(matrix.view(len(matrix), -1, 8)[..., order].flatten(1), 4)

    tensors = {"a.qweight": packed(codes), "a.qzeros": packed(zeros), "a.scales": scales}
    auto_round = AutoRound({"bits": 4, "group_size": 16, "packing_format": "auto_round:auto_awq"}, "BF16")
    actual = decoded(AWQ({"bits": 4, "group_size": 16, "version": "gemm"}, "BF16"), tensors, tmp_path)["a.weight"]
    assert torch.equal(decoded(auto_round, tensors, tmp_path)["a.weight"], actual)
    spread = [table.repeat_interleave(16, 0) for table in (zeros, scales)]
    assert torch.equal(actual, ((codes - spread[0]).half() * spread[1]).T)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_in_four_bits(kind: str, nested: bool, tmp_path: Path) -> None:
    codes, table = integers(0, 16, ROWS * COLUMNS), values(16)
    absmax = values(ROWS * COLUMNS // 64)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": [ROWS, COLUMNS]}
    tensors = {"a.weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8).view(-1, 1), "a.weight.quant_map": table}
    if nested:
        inner, outer, codebook = integers(0, 256, len(absmax)).to(torch.uint8), values(2), values(256)
        state |= {"nested_blocksize": 32, "nested_offset": 0.25, "nested_dtype": "float32"}
        absmax = codebook[inner.long()] * outer.repeat_interleave(32)[: len(inner)] + 0.25
        tensors |= {"a.weight.nested_absmax": outer, "a.weight.nested_quant_map": codebook, "a.weight.absmax": inner}
    else:
        tensors["a.weight.absmax"] = absmax
    described = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"a.weight.quant_state.bitsandbytes__{kind}"] = described
    actual = decoded(BitsAndBytes({"load_in_4bit": True, "bnb_4bit_quant_type": kind}, "BF16"), tensors, tmp_path)
    assert actual.keys() == {"a.weight"}
    expected = (table[codes].view(-1, 64) * absmax.view(-1, 1)).view(ROWS, COLUMNS).half()
    assert torch.equal(actual["a.weight"], expected)


def test_bitsandbytes_in_eight_bits(tmp_path: Path) -> None:
    weight, scale = integers(-127, 128, ROWS, COLUMNS).to(torch.int8), values(ROWS).abs()
    tensors = {"a.weight": weight, "a.SCB": scale, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    actual = decoded(BitsAndBytes({"load_in_8bit": True}, "F32"), tensors, tmp_path)
    assert actual.keys() == {"a.weight"}
    torch.testing.assert_close(actual["a.weight"], weight * scale.view(-1, 1) / 127)


def refused(encoding: Encoding, tensors: dict[str, Tensor], folder: Path, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        decoded(encoding, tensors, folder)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    fp8 = values(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    blocks = FP8({"weight_block_size": [128, 128]}, "BF16")
    refused(blocks, {"a.weight_scale_inv": values(1, 1)}, tmp_path, "no tensor a.weight")
    refused(blocks, {"a.weight": fp8}, tmp_path, "weights are stored as fp8, and none of them is")
    other = {"b.weight": fp8.clone(), "b.weight_scale_inv": values(1, 1)}
    refused(blocks, {"a.weight": fp8, **other}, tmp_path, "a.weight is F8_E4M3, without the scales of fp8")
    refused(blocks, {"a.weight": fp8, "a.weight_scale_inv": values(5, 7)}, tmp_path, "do not fit together as fp8")
    gptq = GPTQ({"bits": 4, "group_size": 16}, "BF16")
    words = {"a.qweight": pack(integers(0, 16, 32, COLUMNS), 4).T, "a.qzeros": pack(integers(0, 9, 4, 32), 4)}
    refused(gptq, words, tmp_path, "no tensor a.scales")
    scaled = words | {"a.scales": values(4, 32).half()}
    refused(gptq, scaled | {"a.g_idx": torch.full((COLUMNS,), 9).int()}, tmp_path, "do not fit together as gptq")
    refused(gptq, scaled | {"a.qzeros": pack(integers(0, 9, 3, 32), 4)}, tmp_path, "do not fit together as gptq")
    optimized = ModelOpt({"quant_algo": "NVFP4"}, "BF16")
    words = {"a.weight": integers(0, 256, ROWS, 32).to(torch.uint8), "a.weight_scale": fp8[:, :4]}
    refused(optimized, words, tmp_path, "no tensor a.weight_scale_2")
    words |= {"a.weight_scale": fp8[:, :2], "a.weight_scale_2": torch.tensor(1.0)}
    refused(optimized, words, tmp_path, "do not fit together as modelopt, NVFP4")
    state = {"a.weight.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}
    refused(BitsAndBytes({"load_in_4bit": True}, "BF16"), state, tmp_path, "do not fit together as bitsandbytes")
    groups = {"g": {"targets": ["b"], "weights": {"num_bits": 8, "strategy": "tensor", "type": "float"}}}
    compressed = CompressedTensors({"config_groups": groups}, "BF16")
    refused(compressed, {"x.a.weight": fp8, "x.a.weight_scale": values(1)}, tmp_path, "no group for x.a")


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        (AWQ, {"bits": 4, "version": "gemv"}, r"awq with version 'gemv' of 4 bits, which qcli does not read"),
        (GPTQ, {"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (CompressedTensors, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        (
            CompressedTensors,
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 6, "type": "float"}}}},
            "6-bit floats",
        ),
        (AutoRound, {"packing_format": "auto_round:llm_compressor"}, "packing_format 'auto_round:llm_compressor'"),
        (FP8, {"weight_block_size": 128}, "weight_block_size 128"),
    ],
)
def test_variants_that_are_not_read_are_named(kind: type[Encoding], config: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedError, match=match):
        kind(config, "BF16")

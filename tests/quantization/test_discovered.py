"""Models without a row of the table, from quantizing to loading in transformers; experts one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qcli.algorithms.layer_group import CROSS, HESSIAN
from qcli.inference.load import load_model
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.statistics import StagedBlock, collect_experts
from qcli.utils.errors import UsageError
from qcli.utils.stored_batches import BatchMemory
from tests.quantizing import TOKENS, logits, run, streamed, write_text
from tests.tiny import WITHOUT_ROW, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", sorted(WITHOUT_ROW))
def test_any_model_is_quantized_and_loads(model_type: str, tmp_path: Path) -> None:
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    full = logits(model)
    torch.testing.assert_close(streamed(model), full, rtol=1e-4, atol=1e-4)
    run(model, out, write_text(tmp_path), method__name="gptq-like", method__bits=8)
    packed = streamed(out)
    torch.testing.assert_close(logits(out), packed, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        loaded = load_model(open_source(str(out)), CPU, torch.float32)(TOKENS).logits
    torch.testing.assert_close(loaded, packed, rtol=1e-4, atol=1e-4)
    assert not torch.equal(packed, full)
    target = full.log_softmax(-1)
    assert (target.exp() * (target - packed.log_softmax(-1))).sum(-1).median() < 1e-3  # some tokens go to other experts


@pytest.mark.parametrize(
    "flags",
    [{}, {"refine__steps": 2}, {"refine__steps": 2, "refine__scope": "linear"}],
    ids=["plain", "refined", "by linear"],
)
def test_experts_are_solved_alike_every_time(flags: dict[str, Any], tmp_path: Path) -> None:
    model, text = tiny_model("qwen3_moe", tmp_path), write_text(tmp_path)
    run(model, tmp_path / "a", text, method__name="gptq-like", **flags)
    run(model, tmp_path / "b", text, method__name="gptq-like", **flags)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "model.layers.1.mlp.experts.3.gate_proj.weight_packed" in first


def test_experts_share_entries_of_the_config(tmp_path: Path) -> None:
    run(tiny_model("qwen3_moe", tmp_path), tmp_path / "out", method__name="rtn")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [entry["match"] for entry in config["layers"]].count("model.layers.*.mlp.experts.*.gate_proj") == 1
    assert len(config["layers"]) == 7


def test_all_experts_may_be_calibrated_on_all_tokens(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    model = tiny_model("mixtral", tmp_path)
    few = run(model, tmp_path / "few", text, calibration__expert_tokens=10_000, method__name="gptq-like")
    noted = [layer.name for layer in few.layers if any("an expert that saw" in line for line in layer.fallbacks)]
    assert len(noted) == 2 * 4 * 3
    run(model, tmp_path / "all", text, calibration__all_experts=True, method__name="gptq-like")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("few", "all"))
    assert any(not torch.equal(first[name], second[name]) for name in first if ".experts." in name)


def test_options_of_experts_are_refused_without_experts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"calibration\.all_experts: .* has no experts"):
        run(tiny_model("llama", tmp_path), tmp_path / "out", write_text(tmp_path), calibration__all_experts=True)


def test_bits_are_chosen_for_experts(tmp_path: Path) -> None:
    model, text = tiny_model("qwen3_moe", tmp_path), write_text(tmp_path)
    method = {"name": "gptq-like", "bits": "auto", "target_bpw": 4.0, "group_size": 32}
    result = run(model, tmp_path / "out", text, grouped=False, method=method)
    assert result.plan.bits_per_weight <= 4
    assert len({layer.spec["bits"] for layer in result.layers if ".experts." in layer.name}) > 1


def staged(tmp_path: Path) -> tuple[StagedBlock, dict[str, torch.Tensor]]:
    """A block of a mixture of experts, and the tokens that each of its experts sees."""
    stream = ModelStream(open_source(str(tiny_model("qwen3_moe", tmp_path))), device=CPU, dtype=torch.float32)
    module = stream.load_block(0)
    hidden = BatchMemory(CPU, on_host=False).store([stream.embed(TOKENS), stream.embed(TOKENS.flip(1))])
    seen: dict[str, list[torch.Tensor]] = {}
    for index in range(4):
        for name in ("gate_proj", "down_proj"):
            path = f"mlp.experts.{index}.{name}"
            rows = seen.setdefault(path, [])
            module.get_submodule(path).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
    with torch.no_grad():
        for batch in hidden:
            stream.run_block(module, 0, batch)
    inputs = {path: torch.cat(rows) if rows else torch.empty(0, 64) for path, rows in seen.items()}
    block = StagedBlock(stream, 0, stream.load_block(0), hidden)
    for group in (0, 1):
        for number in (0, 1):
            block.reach(group, number)
    return block, inputs


def test_an_expert_has_the_statistics_of_its_own_tokens(tmp_path: Path) -> None:
    block, seen = staged(tmp_path)
    for number, name in ((2, "gate_proj"), (3, "down_proj")):
        sets = block.groups[number].sets
        found = collect_experts(number, sets, block, None, frozenset({HESSIAN, CROSS}))
        inputs = [seen[f"mlp.experts.{index}.{name}"].double() for index in range(4)]
        pooled = sum(x.T @ x for x in inputs) / sum(map(len, inputs))
        for x, statistics, paths in zip(inputs, found, sets, strict=True):
            width = x.shape[1]
            missing = max(0, width - len(x))
            expected = (x.T @ x + missing * pooled) / max(width, len(x))
            hessian = statistics.group.hessian
            assert hessian is not None
            torch.testing.assert_close(hessian.double(), expected, rtol=1e-4, atol=1e-6)
            assert bool(statistics.fallbacks) == bool(missing)
            assert tuple(statistics.group.weights) == paths


def test_experts_are_compared_on_the_tokens_of_the_quantized_router(tmp_path: Path) -> None:
    quantized, _ = staged(tmp_path)
    original, _ = staged(tmp_path)
    for each in (quantized, original):
        each.hidden[0], each.hidden[1] = (hidden.clone() for hidden in each.hidden)
    with torch.no_grad():  # another router: tokens take other routes
        quantized.block.get_submodule("mlp.gate").get_parameter("weight").neg_()
    sets = quantized.groups[3].sets
    needs = frozenset({HESSIAN, CROSS})
    compared = collect_experts(3, sets, quantized, original, needs)
    alone = collect_experts(3, sets, quantized, None, needs)
    for both, one in zip(compared, alone, strict=True):
        assert both.group.hessian is not None and both.group.cross is not None and one.group.hessian is not None
        torch.testing.assert_close(both.group.hessian, one.group.hessian)
        # The same weights on the same tokens: the cross moment is the Hessian.
        torch.testing.assert_close(both.group.cross, both.group.hessian)


def test_all_tokens_count_for_all_experts_on_demand(tmp_path: Path) -> None:
    block, _ = staged(tmp_path)
    found = collect_experts(2, block.groups[2].sets, block, None, frozenset({HESSIAN}), every_token=True)
    first = found[0].group.hessian
    assert first is not None
    for statistics in found:
        assert not statistics.fallbacks
        assert statistics.group.hessian is not None
        torch.testing.assert_close(statistics.group.hessian, first)


def test_keys_and_values_for_later_blocks_are_computed_at_every_stage(tmp_path: Path) -> None:
    model = tiny_model("gemma4_text", tmp_path)
    first, second = (open_source(str(model)).family.groups_of(block) for block in (0, 1))
    assert not any(group.leads_out or group.last_reader is not None for group in first)
    assert any(group.leads_out for group in second)
    result = run(model, tmp_path / "out", write_text(tmp_path), method__name="gptq-like")
    assert not any(layer.fallbacks for layer in result.layers)

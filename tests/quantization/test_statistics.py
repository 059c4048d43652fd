"""Stages of a block against plain forward passes of whole models, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.operations import Counting
from qcli.algorithms.layer_group import CROSS, HESSIAN, OUTPUT_GAP
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.statistics import StagedBlock, _add_product, _add_square, collect
from qcli.utils.stored_batches import BatchMemory
from tests.tiny import CONFIGS, VARIANTS, tiny_model

CASES = [*((name, {}) for name in CONFIGS), *VARIANTS]
NEEDS = frozenset({HESSIAN, CROSS, OUTPUT_GAP})
MEMORY = BatchMemory(torch.device("cpu"), on_host=True)


def perturb(module: nn.Module) -> None:
    weight = ModelStream.weight_of(module)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    ModelStream.set_weight(module, weight + 0.05 * noise)


def plain_inputs(stream: ModelStream, block: nn.Module, index: int, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every linear reads in one ordinary pass, and the block's output as `output`."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda _, args: seen.update({name: args[0].flatten(0, -2)})

    hooks = [block.get_submodule(p).register_forward_pre_hook(note(p)) for g in stream.family.groups for p in g.linears]
    seen["output"] = stream.run_block(block, index, hidden)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize(("model_type", "overrides"), CASES, ids=lambda value: str(value))
def test_stages_see_what_plain_passes_see(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    stream = ModelStream(
        open_source(str(tiny_model(model_type, tmp_path, **overrides))),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    tokens = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    batches = [stream.embed(part) for part in tokens.split(2)]
    noisy = [hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)) for hidden in batches]
    quantized = StagedBlock(stream, 1, stream.load_block(1), MEMORY.store(noisy))
    original = StagedBlock(stream, 1, stream.load_block(1), MEMORY.store(batches), final=True)
    reference = stream.load_block(1)

    for index, row in enumerate(stream.family.groups):
        group = collect(index, quantized, original, NEEDS)
        now = [plain_inputs(stream, reference, 1, hidden) for hidden in noisy]
        untouched = stream.load_block(1)
        before = [plain_inputs(stream, untouched, 1, hidden) for hidden in batches]
        for path in row.linears:  # all linears of a group read the same input
            x = torch.cat([seen[path] for seen in now])
            truth = torch.cat([seen[path] for seen in before])
            assert group.hessian is not None
            assert group.cross is not None
            torch.testing.assert_close(group.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(group.cross, truth.T @ x / len(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(group.weights[path], ModelStream.weight_of(reference.get_submodule(path)))
        assert (group.output_gap is not None) == (row.residual is not None)
        for path in row.linears:  # "quantize" the group in both copies
            perturb(quantized.linear(path))
            perturb(reference.get_submodule(path))

    quantized.advance()
    original.advance()
    for staged, hidden in zip(quantized.hidden, noisy, strict=True):
        torch.testing.assert_close(staged, stream.run_block(reference, 1, hidden), rtol=1e-4, atol=1e-5)
    for staged, hidden in zip(original.hidden, batches, strict=True):
        torch.testing.assert_close(staged, stream.run_block(stream.load_block(1), 1, hidden), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_is_computed_once_a_batch(tmp_path: Path) -> None:
    """A later stage needs the outputs of the projection after it, not those of attention."""
    stream = ModelStream(
        open_source(str(tiny_model("llama", tmp_path))), device=torch.device("cpu"), dtype=torch.float32
    )
    batches = [stream.embed(part) for part in torch.randint(3, 300, (4, 12)).split(2)]
    staged = StagedBlock(stream, 0, stream.load_block(0), MEMORY.store(batches))
    with Counting() as counting:
        for group in range(len(stream.family.groups)):
            collect(group, staged, None, frozenset({HESSIAN}))
        staged.advance()
    attention = {name: count for name, count in counting.by_name.items() if "attention" in name}
    assert sum(attention.values()) == len(batches), attention


@torch.no_grad()
def test_wide_inputs_are_summed_in_panels() -> None:
    x, difference = torch.randn(40, 700), torch.randn(40, 300)
    sums: dict[str, torch.Tensor] = {}
    for part in (slice(0, 25), slice(25, 40)):
        _add_square(sums, "square", x[part])
        _add_product(sums, "product", difference[part], x[part])
    torch.testing.assert_close(sums["square"].triu(), (x.T @ x).triu(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums["product"], difference.T @ x, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        _add_product(sums, "bf16", difference, x)
    assert sums["bf16"].dtype == torch.float32
    torch.testing.assert_close(sums["bf16"], sums["product"], rtol=0.02, atol=0.2)


@torch.no_grad()
def test_output_gap_is_what_the_stream_will_lack(tmp_path: Path) -> None:
    stream = ModelStream(
        open_source(str(tiny_model("llama", tmp_path))), device=torch.device("cpu"), dtype=torch.float32
    )
    hidden = stream.embed(torch.randint(3, 300, (2, 12)))
    noisy = hidden + 0.1
    quantized = StagedBlock(stream, 0, stream.load_block(0), MEMORY.store([noisy]))
    original = StagedBlock(stream, 0, stream.load_block(0), MEMORY.store([hidden]), final=True)
    assert collect(0, quantized, original, frozenset({OUTPUT_GAP})).cross is not None  # nothing is added to the stream
    group = collect(1, quantized, original, frozenset({OUTPUT_GAP}))
    block = stream.load_block(0)
    inputs, true = (plain_inputs(stream, block, 0, state)["self_attn.o_proj"] for state in (noisy, hidden))
    gap = (true - inputs) @ ModelStream.weight_of(block.get_submodule("self_attn.o_proj")).T
    gap += (hidden - noisy).flatten(0, 1)
    assert group.output_gap is not None and group.cross is None
    torch.testing.assert_close(group.output_gap, gap.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)

"""Objectives against the same thing computed plainly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qcli.algorithms.training.batches import Sampling, Split
from qcli.core.activations import Activations
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.objectives import BlockObjective, ModelObjective
from qcli.utils.stored_batches import BatchMemory
from tests.tiny import tiny_model

TOKENS = torch.randint(3, 300, (7, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_model(request.param, tmp_path)


@pytest.fixture
def stream(folder: Path) -> ModelStream:
    return ModelStream(open_source(str(folder)), device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def test_block_objective_is_the_mean_relative_error_of_tokens(stream: ModelStream) -> None:
    block, paths = stream.load_block(0), [path for group in stream.family.groups for path in group.linears]
    batches = [stream.embed(part) for part in torch.split(TOKENS, 2)]
    batches[1][0, 0] *= 300  # one token far larger than the others
    targets = [stream.run_block(block, 0, batch) for batch in batches]
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for path in paths:
        weight = stream.weight_of(block.get_submodule(path))
        weights[path] = weight + 0.05 * torch.randn(weight.shape, generator=generator)
    memory = BatchMemory(stream.device)
    objective = BlockObjective(
        partial(stream.run_block, block, 0),
        Split(memory.store(batches[:3]), memory.store(batches[3:])),
        Split(memory.store(targets[:3]), memory.store(targets[3:])),
        Sampling(32, "s"),
    )
    original = {path: stream.weight_of(block.get_submodule(path)).clone() for path in paths}
    assert objective.held_out(original) == pytest.approx(0, abs=1e-9)

    changed = stream.load_block(0)
    for path, weight in weights.items():
        stream.set_weight(changed.get_submodule(path), weight)

    typical = torch.cat([target.norm(dim=-1).flatten() for target in targets[:3]]).median()
    lengths = torch.cat(targets).norm(dim=-1).clamp(max=float(typical))
    assert float(torch.cat(targets).norm(dim=-1).max()) > 20 * float(typical)

    def error(number: int) -> float:
        hidden, target = batches[number // 2][number % 2], targets[number // 2][number % 2]
        output = stream.run_block(changed, 0, hidden[None])[0]
        return float(((output - target).square().sum(-1) / (target.norm(dim=-1) * lengths[number])).mean())

    assert objective.held_out(weights) == pytest.approx(error(6), rel=1e-4)
    step = next(step for step in range(3) if 2 in objective.sampler.indices(step))
    expected = sum(error(number) for number in objective.sampler.indices(step)) / 2
    assert float(objective.loss(weights, step)) == pytest.approx(expected, rel=1e-4)
    for path in paths:
        assert torch.equal(stream.weight_of(block.get_submodule(path)), original[path])


@torch.no_grad()
def test_samples_of_several_lengths_count_by_their_tokens(stream: ModelStream) -> None:
    block, memory = stream.load_block(0), BatchMemory(stream.device)
    batches = [stream.embed(TOKENS[:1]), stream.embed(TOKENS[1:2, :7])]
    targets = [stream.run_block(block, 0, batch) for batch in batches]
    path = stream.family.groups[0].linears[0]
    weights = {path: 1.1 * stream.weight_of(block.get_submodule(path))}
    inputs, outputs = memory.store(batches), memory.store(targets)
    objective = BlockObjective(
        partial(stream.run_block, block, 0), Split(inputs, inputs), Split(outputs, outputs), Sampling(22, "s")
    )
    assert sorted(objective.sampler.indices(0)) == [0, 1]
    assert float(objective.loss(weights, 0)) == pytest.approx(objective.held_out(weights), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("predictions", [False, True])
def test_model_objective_is_the_models_own_loss(stream: ModelStream, folder: Path, predictions: bool) -> None:
    blocks = [stream.load_block(index) for index in range(stream.n_blocks)]
    (path, *_) = stream.family.groups[-1].linears
    weight = 0.5 * stream.weight_of(blocks[1].get_submodule(path))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    original = model(TOKENS[5:]).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    module = model.get_submodule(f"{stream.family.blocks}.1.{path}")
    stream.set_weight(module, weight)
    found = model(TOKENS[5:]).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    expected = F.nll_loss(found, TOKENS[5:, 1:].flatten())
    if predictions:
        expected = (original.exp() * (original - found)).sum(-1).mean()
    objective = ModelObjective(
        stream, blocks, Split(TOKENS[:5], TOKENS[5:]), Sampling(32, "s"), predictions=predictions, fast=False
    )
    assert objective.held_out({f"1.{path}": weight}) == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_model_objective_quantizes_activations_of_the_judged_model_alone(stream: ModelStream) -> None:
    blocks = [stream.load_block(index) for index in range(stream.n_blocks)]
    linears = [
        block.get_submodule(path) for block in blocks for group in stream.family.groups for path in group.linears
    ]

    def kl(bits: int) -> float:
        @contextmanager
        def simulate() -> Iterator[None]:
            hooks = [Activations(bits=bits).simulate(linear) for linear in linears]
            yield
            for hook in hooks:
                hook.remove()

        objective = ModelObjective(
            stream, blocks, Split(TOKENS, TOKENS), Sampling(32, "s"), predictions=True, fast=False, simulate=simulate
        )
        return objective.held_out({})

    assert 0 < kl(8) < kl(4)
    assert not any(linear._forward_pre_hooks for linear in linears)

"""The table of families, and the rows' claims about what reads and writes what, checked on real blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from qcli.models.families import FAMILIES, block_count, family
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.utils.errors import UnsupportedError, UsageError
from tests.tiny import VARIANTS, tiny_model

ROWS: list[tuple[str, dict[str, Any]]] = [*((model_type, {}) for model_type in FAMILIES), *VARIANTS]


class Block:
    """The first block of a tiny model and its row."""

    def __init__(self, stream: ModelStream) -> None:
        self.stream, self.groups = stream, stream.family.groups
        self.module = stream.load_block(0)

    def run(self) -> Tensor:
        """The block's output on a few tokens, followed by autograd."""
        hidden = self.stream.embed(torch.arange(3, 27).view(2, 12)).requires_grad_()
        return self.stream.run_block(self.module, 0, hidden)

    def before(self, path: str, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Show `hook` what module `path` reads; it may return something else to read."""
        return self.module.get_submodule(path).register_forward_pre_hook(lambda _, args: hook(args[0]))


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: "-".join([row[0], *map(str, row[1].values())]))
def stream(request: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelStream:
    model_type, overrides = request.param
    path = tiny_model(model_type, tmp_path_factory.mktemp("models"), **overrides)
    return ModelStream(open_source(str(path)), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def block(stream: ModelStream) -> Block:
    return Block(stream)


def test_a_row_names_every_linear_of_a_block_once(block: Block) -> None:
    modules = block.module.named_modules()
    linears = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    assert sorted(path for group in block.groups for path in group.linears) == sorted(linears)


def test_a_group_reads_one_input_and_groups_come_in_order(block: Block) -> None:
    inputs: dict[str, Tensor] = {}
    for group in block.groups:
        for path in group.linears:
            block.before(path, partial(inputs.__setitem__, path))
    block.run()
    for group in block.groups:
        first, *others = group.linears
        assert all(torch.equal(inputs[path], inputs[first]) for path in others)
    order = list(inputs)
    firsts = [min(order.index(path) for path in group.linears) for group in block.groups]
    assert firsts == sorted(firsts)


def test_outputs_join_the_residual_stream_where_the_row_says(block: Block) -> None:
    """The block's output has the same gradient towards a linear's output and towards the stream it joins.

    For that, only their sum may read the stream: linears before the sum, and in parallel blocks the linears
    beside it, get detached inputs.
    """
    parallel = len({group.residual for group in block.groups}) == 2
    for index, group in enumerate(block.groups):
        if group.residual is None:
            continue
        others = [other for i, other in enumerate(block.groups) if i < index or (parallel and i != index)]
        seen: dict[str, Tensor] = {}
        handles = [block.before(group.residual, partial(seen.__setitem__, "stream"))]
        handles += [block.before(path, Tensor.detach) for other in others for path in other.linears]
        (path,) = group.linears
        handles.append(block.module.get_submodule(path).register_forward_hook(partial(_note_output, seen)))
        output = block.run()
        probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad((output * probe).sum(), (seen["output"], seen["stream"]))
        torch.testing.assert_close(gradients[0].reshape(-1), gradients[1].reshape(-1))
        for handle in handles:
            handle.remove()


def _note_output(seen: dict[str, Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    seen["output"] = output.requires_grad_()


def test_unknown_families_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="'mamba' is not supported here") as raised:
        family({"model_type": "mamba"})
    assert raised.value.hint is not None and "llama" in raised.value.hint


def test_a_config_without_model_type_or_depth_is_refused() -> None:
    with pytest.raises(UsageError, match="model_type"):
        family({})
    with pytest.raises(UsageError, match="num_hidden_layers"):
        block_count({"model_type": "llama"})


def test_depth_is_found_under_every_name() -> None:
    assert block_count({"num_hidden_layers": 3}) == 3
    assert block_count({"n_layer": 4}) == 4
    assert block_count({"text_config": {"num_hidden_layers": 5}}) == 5


def test_settings_that_a_config_leaves_out_have_their_defaults() -> None:
    assert family({"model_type": "gpt_neox"}) == family({"model_type": "gpt_neox", "use_parallel_residual": True})
    assert family({"model_type": "stablelm"}).groups == family({"model_type": "llama"}).groups
    assert len(family({"model_type": "falcon"}).groups[0].linears) == 2

"""Which channels of a block are found to be scalable, on small blocks that each do one thing; and which never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qcli.models.channels import Channels, Operation
from qcli.models.families import Fold

SIZE = 8
Forward = Callable[["Block", Tensor], Any]


class RMSNorm(nn.Module):
    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(SIZE)), offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shifted, self.layer_norm = RMSNorm(), RMSNorm(1.0), nn.LayerNorm(SIZE)
        for name in ("gate", "up", "down", "other"):
            self.add_module(name, nn.Linear(SIZE, SIZE))
        self.router = nn.Parameter(torch.ones(3, SIZE))
        self.turned = nn.Parameter(torch.ones(SIZE, 3))


def folds(
    forward: Forward, shared: tuple[str, ...] = (), unused: bool = False
) -> tuple[dict[str, Fold], dict[str, str]]:
    """Folds by producer, and by norm the reasons why there is none.

    Args:
        shared: parameters that another block has too.
        unused: whether the block has matrices that `forward` does not use.
    """
    block = Block().to("meta")
    for name in ("gate", "up", "down", "other", "router", "turned"):
        if not unused and name not in forward.__code__.co_names:
            delattr(block, name)
    channels = Channels(block, shared)

    class Follow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            channels.follow(Operation(func, args, kwargs or {}, out))
            return out

    x = torch.zeros(2, 3, SIZE, device="meta")
    with torch.no_grad(), Follow():  # type: ignore[no-untyped-call]
        out = forward(block, x)
    channels.end([out], "the end")
    found, reasons = channels.folds(["gate", "up", "down", "other"])
    return {fold.producer: fold for fold in found}, reasons


def gated(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return x + block.down(F.silu(block.gate(y)) * block.up(y))


def two_factors(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return x + block.down(F.relu(block.gate(y)) * block.up(y))


def layer_norm_and_view(block: Any, x: Tensor) -> Any:
    y = block.layer_norm(x).double().view(-1, SIZE).float()
    return block.up(y)


def shifted_layer_norm(block: Any, x: Tensor) -> Any:
    return block.up(F.layer_norm(x, (SIZE,), block.shifted.weight + 1))


def routed(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return block.up(y) * F.linear(y.double(), block.router.double()).softmax(-1)[..., :1].float()


def attention(block: Any, x: Tensor) -> Any:
    y = block.shifted(x)
    values = block.up(y).unflatten(-1, (2, 4)).transpose(1, 2)[:, :1].expand(-1, 2, -1, -1)
    scores = torch.ones(2, 2, 3, 3, device=x.device).softmax(-1)
    return block.down((scores @ values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (gated, {"norm": ("gate", "up"), "up": ("down",)}),
        (two_factors, {"norm": ("gate", "up"), "up": ("down",)}),
        (layer_norm_and_view, {"layer_norm": ("up",)}),
        (shifted_layer_norm, {"shifted": ("up",)}),
        (routed, {"norm": ("up",)}),
        (attention, {"shifted": ("up",), "up": ("down",)}),
    ],
)
def test_folds_are_found(forward: Forward, expected: dict[str, tuple[str, ...]]) -> None:
    found, _ = folds(forward)
    assert {producer: fold.readers for producer, fold in found.items()} == expected


def test_routers_offsets_and_heads_are_part_of_folds() -> None:
    assert folds(routed)[0]["norm"].dense == ("router",)
    assert folds(shifted_layer_norm)[0]["shifted"].norm_offset == 1.0
    found, _ = folds(attention)
    assert found["shifted"].norm_offset == 1.0
    places = found["up"].places
    assert places is not None
    assert list(places.outputs) == [0, 1, 2, 3, -1, -1, -1, -1]
    assert list(places.inputs) == [0, 1, 2, 3, 0, 1, 2, 3]


def residual(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return y + block.up(y)


def in_place(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return x + block.up(y.mul_(2))


def turned(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return block.up(y) * (y @ block.turned)[..., :1]


def given_away(block: Any, x: Tensor) -> Tensor:
    y: Tensor = block.norm(x)
    block.up(y)
    return y


def mixed(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return block.up(y + y.flip(-1))


def weight_elsewhere(block: Any, x: Tensor) -> Any:
    return block.up(block.norm(x)) + block.norm.weight.softmax(-1)


def reader_elsewhere(block: Any, x: Tensor) -> Any:
    return block.up(block.norm(x)) + block.up(x)


def halves(block: Any, x: Tensor) -> Any:
    y = block.norm(x)
    return block.up(y) + block.down(torch.cat([y[..., 4:], y[..., :4]], -1))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (residual, "add reads it beside linear layers"),
        (in_place, "mul_ reads it beside linear layers"),
        (turned, "mm reads it beside linear layers"),
        (given_away, "the end reads it beside linear layers"),
        (mixed, "no linear layer reads it"),
        (weight_elsewhere, "_softmax reads it, as its weight or bias"),
        (reader_elsewhere, "up.weight reads it and something else"),
        (halves, "down.weight and up.weight read different channels"),
    ],
)
def test_what_else_is_read_is_not_folded(forward: Forward, reason: str) -> None:
    found, reasons = folds(forward)
    assert "norm" not in found
    assert reasons["norm"] == reason


def test_shared_weights_and_unknown_readers_are_not_folded() -> None:
    _, reasons = folds(gated, shared=("norm.weight",))
    assert reasons["norm"] == "it is shared, as its weight or bias"
    found, reasons = folds(gated, shared=("up.weight",))
    assert not found and reasons["norm"] == "it is shared: up.weight"
    found, reasons = folds(gated, unused=True)
    assert not found and reasons["norm"] == "it is not known what router reads"

"""A model whose blocks cannot run one by one is refused before anything is computed from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.granite.modeling_granite import GraniteDecoderLayer

from qcli.models.listed_experts import ListedExperts
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.utils.errors import UnsupportedError
from tests.quantizing import TOKENS, run, streamed, write_text
from tests.tiny import tiny_model


def patched(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Granite's blocks, whose outputs a function of block and hidden states changes."""
    forward = GraniteDecoderLayer.forward

    def changed(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return change(self, forward(self, hidden, *args, **kwargs))

    monkeypatch.setattr(GraniteDecoderLayer, "forward", changed)


def test_a_block_that_keeps_something_of_its_last_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_last(block: Any, output: Tensor) -> Tensor:
        last, block.__dict__["last"] = block.__dict__.get("last", torch.zeros(())), output.mean()
        output += 5 * last
        return output

    patched(monkeypatch, add_last)
    with pytest.raises(
        UnsupportedError, match=r"'granite': block 0 by itself gives other outputs than in the model.*%"
    ):
        streamed(tiny_model("granite", tmp_path))


def test_a_block_that_reads_what_another_computed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Tensor] = []

    def add_others(_: Any, output: Tensor) -> Tensor:
        computed.append(output.mean())
        return output + computed[0]

    patched(monkeypatch, add_others)
    model = tiny_model("granite", tmp_path)
    with pytest.raises(UnsupportedError, match="block 1 reads what block 0 computed"):
        run(model, tmp_path / "out", write_text(tmp_path), method__name="gptq-like")
    run(model, tmp_path / "rtn", method__name="rtn")  # runs no block


def test_something_between_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = GraniteDecoderLayer.__call__
    monkeypatch.setattr(GraniteDecoderLayer, "__call__", lambda self, *a, **k: forward(self, *a, **k) * 2)
    with pytest.raises(UnsupportedError, match="something is computed between blocks 0 and 1"):
        streamed(tiny_model("granite", tmp_path))


def test_experts_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ListedExperts.expert
    monkeypatch.setattr(ListedExperts, "expert", lambda self, index, x: own(self, index, x) * (1 + index))
    with pytest.raises(UnsupportedError, match=r"block 0: mlp\.experts by itself gives other outputs"):
        streamed(tiny_model("qwen3_moe", tmp_path))


def test_what_passes_between_blocks_is_exact_and_small(tmp_path: Path) -> None:
    source = open_source(str(tiny_model("gemma4_text", tmp_path)))
    for dtype in (torch.float32, torch.bfloat16):
        stream = ModelStream(source, device=torch.device("cpu"), dtype=dtype)
        hidden = stream.embed(TOKENS)
        assert hidden.shape[-1] == stream.width > 64
        assert hidden[..., 64:].abs().max() < 1e-4
        by_blocks = stream.logits_of(TOKENS)
        others = torch.cat([stream.logits_of(TOKENS[:1]), stream.logits_of(TOKENS[1:])])
        torch.testing.assert_close(by_blocks, others)
    half = ModelStream(source, device=torch.device("cpu"), dtype=torch.float16)
    with pytest.raises(UnsupportedError, match="too small for float16"):
        half.embed(TOKENS)

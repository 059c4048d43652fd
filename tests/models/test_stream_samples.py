"""Samples of text and images run block by block as they run through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.utils.errors import UnsupportedError
from qcli.utils.stored_batches import BatchMemory
from tests.images import with_image
from tests.quantizing import TOKENS
from tests.tiny import tiny_model

CPU = torch.device("cpu")
TYPES = ("llava", "qwen2_5_vl", "qwen3_vl_moe", "qwen3_5", "gemma3", "gemma4", "idefics3", "mistral3", "internvl")


def samples(model_type: str) -> list[dict[str, Tensor]]:
    """With images, of several lengths; and one of text alone."""
    return [with_image(model_type), with_image(model_type, 17), {"input_ids": TOKENS[1:, :11]}]


def opened(model: Path) -> ModelStream:
    return ModelStream(open_source(str(model)), device=CPU, dtype=torch.float32)


@torch.no_grad()
def through_whole_model(model: Path, family: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What leaves the blocks, in turn, and the logits."""
    auto: Any = AutoModelForImageTextToText
    whole = auto.from_pretrained(model, dtype=torch.float32).eval()
    left: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    for block in whole.get_submodule(family.blocks):
        block.register_forward_hook(note)
    logits = whole(**inputs).logits
    return [*left, logits]


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_blocks_compute_what_the_whole_model_computes(model_type: str, on_host: bool, tmp_path: Path) -> None:
    model = tiny_model(model_type, tmp_path)
    stream = opened(model)
    given = samples(model_type)
    expected = [through_whole_model(model, stream.family, inputs) for inputs in given]
    memory = BatchMemory(CPU, on_host=on_host)
    hidden = memory.store(stream.embed_samples(enumerate(given), memory))
    with torch.no_grad():
        for index in range(stream.n_blocks):
            stream.advance(stream.load_block(index), index, hidden)
            for found, (*left, _) in zip(hidden, expected, strict=True):
                own = found[..., : left[index].shape[-1]]
                torch.testing.assert_close(own, left[index], rtol=1e-4, atol=1e-4)
        for found, (*_, logits) in zip(hidden, expected, strict=True):
            torch.testing.assert_close(stream.logits(found), logits, rtol=1e-4, atol=1e-4)
    towers = [*stream.model.get_submodule(stream.family.dense_parts[0]).parameters()]
    assert not towers  # not in memory any more
    assert all(weight.is_meta for part in stream._beside.values() for weight in part.parameters())


def test_an_image_counts(tmp_path: Path) -> None:
    """Another one changes what leaves the blocks."""
    model = tiny_model("qwen2_5_vl", tmp_path)
    stream, memory = opened(model), BatchMemory(CPU)
    one = with_image("qwen2_5_vl")
    other = one | {"pixel_values": one["pixel_values"] + 1}
    hidden = memory.store(stream.embed_samples(enumerate([one, other]), memory))
    assert torch.equal(hidden[0][:, :5, :64], hidden[1][:, :5, :64])
    assert not torch.equal(hidden[0][:, 5, :64], hidden[1][:, 5, :64])


def test_samples_of_several_lengths_run_at_once(tmp_path: Path) -> None:
    """As training picks them, whose batches hold samples of one length."""
    stream, memory = opened(tiny_model("qwen2_5_vl", tmp_path)), BatchMemory(CPU)
    given = [with_image("qwen2_5_vl"), {"input_ids": TOKENS[1:]}]
    hidden = memory.store(stream.embed_samples(enumerate(given), memory))
    block = stream.load_block(0)
    with torch.no_grad():
        apart = [stream.run_block(block, 0, each) for each in hidden]
        both = stream.run_block(block, 0, torch.cat([*hidden]))
        again = stream.run_block(block, 0, torch.cat([*hidden][::-1]))
    assert torch.equal(both, torch.cat(apart))
    assert torch.equal(again, torch.cat(apart[::-1]))


def refusal(stream: ModelStream, inputs: dict[str, Tensor]) -> str:
    memory = BatchMemory(CPU)
    with pytest.raises(UnsupportedError) as caught:
        memory.store(stream.embed_samples([(0, inputs)], memory))
    return caught.value.message


def test_what_cannot_run_block_by_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "'mllama': its blocks cannot run one by one" in refusal(
        opened(tiny_model("mllama", tmp_path)), with_image("llava")
    )
    model = tiny_model("qwen3_vl_moe", tmp_path)
    inputs = with_image("qwen3_vl_moe")
    unseen = {name: value for name, value in inputs.items() if name != "pixel_values"} | {"input_ids": TOKENS[:1]}
    assert "does not look at the images" in refusal(opened(model), unseen)
    misplaced = inputs | {"input_ids": TOKENS[:1]}
    assert "fails on text and images (" in refusal(opened(model), misplaced)
    stream = opened(model)
    text: Any = stream.model.model.language_model
    monkeypatch.setattr(text, "_deepstack_process", lambda hidden, mask, features: hidden * 2)
    assert "something else than a sum is computed before block 1 with images" in refusal(stream, inputs)

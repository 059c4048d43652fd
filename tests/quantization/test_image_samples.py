"""Calibration with text and images, through the model's processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from qcli.algorithms.layer_group import HESSIAN
from qcli.data.image_samples import image_samples, processed
from qcli.models.manifest import Manifest
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.quantization.statistics import StagedBlock, collect
from qcli.utils.errors import QcliError, StateError, UnsupportedError, UsageError
from qcli.utils.run_folder import RunFolder
from qcli.utils.stored_batches import BatchMemory
from tests.images import picture, with_processor, write_pairs
from tests.quantizing import in_pieces, run, weights, write_text
from tests.tiny import tiny_model

pytest.importorskip("PIL")
CPU = torch.device("cpu")
LONG: dict[str, Any] = {"calibration__seq_len": 64}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    return with_processor("llava", tiny_model("llava", tmp_path))


@pytest.mark.parametrize("model_type", ["llava", "idefics3"])
def test_statistics_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    """Every token counts once, those of images included; samples of several lengths are not padded."""
    model, pairs = with_processor(model_type, tiny_model(model_type, tmp_path)), write_pairs(tmp_path / "data")
    source = open_source(str(model))
    samples = image_samples(str(pairs), source, samples=6, seq_len=64, seed=1)
    assert len(set(samples.lengths)) > 1

    auto: Any = AutoModelForImageTextToText
    whole = auto.from_pretrained(model, dtype=torch.float32).eval()
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(0, -2))

    whole.get_submodule(f"{source.family.blocks}.1.mlp.down_proj").register_forward_pre_hook(note)
    with torch.no_grad():
        for _, inputs in processed(samples, source):
            whole(**inputs)
    rows = torch.cat(seen)
    assert len(rows) == sum(samples.lengths)

    stream, memory = ModelStream(source, device=CPU, dtype=torch.float32), BatchMemory(CPU)
    hidden = memory.store(stream.embed_samples(processed(samples, source), memory))
    with torch.no_grad():
        stream.advance(stream.load_block(0), 0, hidden)
        staged = StagedBlock(stream, 1, stream.load_block(1), hidden)
        last = len(staged.groups) - 1
        for group in range(last + 1):
            found = collect(group, staged, None, frozenset({HESSIAN}))
    assert staged.groups[last].linears == ("mlp.down_proj",)
    assert found.hessian is not None
    torch.testing.assert_close(found.hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_quantizing_with_images(llava: Path, tmp_path: Path) -> None:
    """Names of images and their order do not matter, their content does; all of it is recorded."""
    gptq: dict[str, Any] = {"method__name": "gptq-like", **LONG}
    pairs = write_pairs(tmp_path / "data")
    run(llava, tmp_path / "out", pairs, **gptq)
    moved = write_pairs(tmp_path / "moved")
    run(llava, tmp_path / "again", moved, **gptq)
    assert weights(tmp_path / "out") == weights(tmp_path / "again")
    for number in range(8):
        (moved.parent / f"{number}.png").write_bytes(picture(number + 100))
    run(llava, tmp_path / "other", moved, **gptq)
    assert weights(tmp_path / "out") != weights(tmp_path / "other")
    first, other = Manifest.read(tmp_path / "out"), Manifest.read(tmp_path / "other")
    assert first.calibration_images_sha256 != other.calibration_images_sha256
    assert first.calibration_tokens_sha256 != other.calibration_tokens_sha256
    assert first.calibration_text_identity == other.calibration_text_identity
    run(llava, tmp_path / "text", write_text(tmp_path), **gptq)
    assert Manifest.read(tmp_path / "text").calibration_images_sha256 is None


@pytest.mark.slow
def test_training_and_resuming(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are reconstructed on samples of several lengths; an interrupted run gives the same bytes."""
    pairs = write_pairs(tmp_path / "data")
    given: dict[str, Any] = {
        "method__name": "rtn",
        "calibration__held_out": 2,
        "method__bits": 2,
        "refine": {"scope": "block", "steps": 10, "batch_tokens": 64, "train": ["tables"]},
        **LONG,
    }
    result = run(llava, tmp_path / "out", pairs, **given)
    assert result.training and all(outcome["after"] < outcome["before"] for outcome in result.training.values())
    stops = in_pieces(lambda: run(llava, tmp_path / "again", pairs, **given), tmp_path / "again", monkeypatch)
    assert stops >= 3
    assert weights(tmp_path / "out") == weights(tmp_path / "again")


def test_transforms_of_blocks_are_trained_on_images(llava: Path, tmp_path: Path) -> None:
    """Folds of a model without a row are proven on text beforehand."""
    pairs = write_pairs(tmp_path / "data")
    assert open_source(str(llava)).family.discovered
    given: dict[str, Any] = {"method__name": "teq", "method__bits": 3, "method__steps": 4, "method__lr": 0.02, **LONG}
    result = run(llava, tmp_path / "out", pairs, **given)
    assert [*result.training] == ["block 0 teq", "block 1 teq"]
    assert all(outcome["after"] < outcome["before"] for outcome in result.training.values())


def test_another_image_is_another_run(llava: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data")

    with pytest.MonkeyPatch.context() as patch:
        commit = RunFolder.commit

        def commit_and_stop(*given: Any) -> None:
            commit(*given)
            raise KeyboardInterrupt

        patch.setattr(RunFolder, "commit", commit_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(llava, tmp_path / "out", pairs, method__name="gptq-like", **LONG)
    (pairs.parent / "3.png").write_bytes(picture(99))
    with pytest.raises(StateError, match="data"):
        run(llava, tmp_path / "out", pairs, method__name="gptq-like", resume="required", **LONG)


def problem(kind: type[QcliError], *args: Any, **flags: Any) -> str:
    with pytest.raises(kind) as caught:
        run(*args, method__name="gptq-like", **flags)
    return caught.value.message


def test_what_cannot_be_done_with_images_is_refused(llava: Path, tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "data"), tmp_path / "out"
    text_model = tiny_model("llama", tmp_path)
    assert "which" in (message := problem(UnsupportedError, text_model, out, pairs)) and "does not see" in message
    bare = tiny_model("llava", tmp_path)
    assert problem(UnsupportedError, bare, out, pairs).endswith("has no processor of images")
    assert "bos: true" in problem(UsageError, llava, out, pairs, bos=True)
    assert "has 8 rows, and 9 samples" in problem(UsageError, llava, out, pairs, calibration__samples=9)
    assert "tokens, those of images counted, and calibration.seq_len is 16" in problem(
        UsageError, llava, out, pairs, calibration__seq_len=16
    )
    message = problem(UnsupportedError, llava, out, pairs, method__bits="auto", method__target_bpw=4.5, **LONG)
    assert "bits: auto compares models on text alone" in message
    assert not out.exists()


def test_text_is_not_read_of_rows_with_images(llava: Path, tmp_path: Path) -> None:
    from qcli.data.tokens import evaluation_tokens

    pairs = write_pairs(tmp_path / "data")
    with pytest.raises(UnsupportedError, match="has rows with images, which only calibration for quantize reads"):
        evaluation_tokens(str(pairs), open_source(str(llava)), window=8)


def test_messages_and_plain_text_give_the_same(llava: Path, tmp_path: Path) -> None:
    """Where a text has no token for its image, it is a message of a user behind the image."""
    source = open_source(str(llava))
    text = {"type": "text", "text": "a cat"}
    rows: list[dict[str, Any]] = [
        {"text": "a cat"},
        {"text": "<image>a cat|"},
        {"messages": [{"role": "user", "content": "a cat"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, text]}]},
    ]
    found = []
    (tmp_path / "0.png").write_bytes(picture(0))
    for row in rows:
        file = tmp_path / "one.jsonl"
        file.write_text(json.dumps({"image": "0.png", **row}))
        found.append(image_samples(str(file), source, samples=1, seq_len=64, seed=0).sha256)
    assert len(set(found)) == 1
    file.write_text(json.dumps({"image": None, "text": "a cat"}))
    alone = image_samples(str(file), source, samples=1, seq_len=64, seed=0)
    (_, inputs), *_ = processed(alone, source)
    assert "pixel_values" not in inputs

"""Distillation of whole checkpoints: it improves them, resumes exactly, and writes ordinary checkpoints."""

from __future__ import annotations

import json
import shutil
import tempfile
from atexit import register
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qcli.distillation import blockwise as blockwise_module
from qcli.distillation.distill import distill
from qcli.distillation.plan import plan_distillation
from qcli.distillation.result import DistillationResult
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.export.verify import verify
from qcli.models.manifest import Manifest
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.quantization.calibrate import calibrate
from qcli.recipe.load import load_recipe
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.stored_batches import BatchMemory
from tests.quantizing import in_pieces, logits, run, streamed, write_text
from tests.tiny import tiny_model, with_bos

METHODS: dict[str, dict[str, Any]] = {
    "gptq-like": {"method__bits": 2, "method__zero_point": "float"},
    "lcq": {"method__bits": 2, "method__steps": 0},
    "dbllm": {},
    "onebit": {},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


_students: dict[str, Path] = {}


def make_pair(tmp_path: Path, text: Path, method: str = "gptq-like", **flags: Any) -> tuple[Path, Path]:
    """A teacher and a quantized student; quantization runs once per set of options."""
    teacher, out, key = tiny_model("llama", tmp_path), tmp_path / "student", f"{method} {flags}"
    if key not in _students:
        folder = Path(tempfile.mkdtemp())
        register(shutil.rmtree, folder, ignore_errors=True)
        run(teacher, folder / "out", text, grouped=method != "onebit", method__name=method, **METHODS[method], **flags)
        _students[key] = folder / "out"
    return teacher, Path(shutil.copytree(_students[key], out))


def train(student: Path, teacher: Path, out: Path, text: Path, *sets: str) -> DistillationResult:
    flags = {"model": str(teacher), "calibration.data": str(text), "distill.steps": 24}
    flags |= {"calibration.samples": 28, "calibration.seq_len": 32}
    recipe = load_recipe(
        None, flags | {"distill.judgements": 4}, ("distill.tables_lr=0.01", "distill.batch_tokens=256", *sets)
    )
    return distill(student, recipe, out)


def codes(folder: Path) -> dict[str, torch.Tensor]:
    source = open_source(str(folder))
    assert isinstance(source, NativeSource)
    return {name: source.read_quantized(name).codes for name in source.quantized}


def held_out_losses(result: DistillationResult) -> list[float | None]:
    return [held_out for _, _, held_out in result.outcome.curve]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_students_come_closer_to_their_teacher(method: str, tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text, method)
    out = tmp_path / "out"
    result = train(student, teacher, out, text)
    assert result.outcome.after < 0.95 * result.outcome.before
    assert verify(out).layers == 14
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    kls = [
        evaluate(str(folder), EvalOptions([str(text)], window=32), baseline=str(teacher)).kl
        for folder in (student, out)
    ]
    assert kls[0] is not None and kls[1] is not None
    assert kls[1] < kls[0]
    before, after = codes(student), codes(out)
    assert all(torch.equal(after[name], code) for name, code in before.items()), "tables alone were trained"
    manifest = json.loads((out / "qcli.manifest.json").read_text())
    assert manifest["distilled"][0]["outcome"]["after"] == result.outcome.after
    assert manifest["recipe"]["distill"]["steps"] == 24


@pytest.mark.slow
def test_students_with_norms_learn_by_the_loss_of_their_paper(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text, "onebit", method__paper=True)
    out = tmp_path / "out"
    outcome = train(student, teacher, out, text, "distill.loss=onebit", "distill.train=[tables, weights]").outcome
    assert outcome.after < 0.8 * outcome.before
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    before, after = (
        evaluate(str(folder), EvalOptions([str(text)], window=32), baseline=str(teacher)).kl
        for folder in (student, out)
    )
    assert before is not None and after is not None and after < before


@pytest.mark.slow
def test_latent_weights_are_trained_on_request(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text, "dbllm")
    train(student, teacher, tmp_path / "out", text, "distill.train=[tables, weights]", "distill.weights_lr=0.05")
    before, after = codes(student), codes(tmp_path / "out")
    assert any(not torch.equal(after[name], code) for name, code in before.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "others"),
    [
        (("loss=onebit",), ()),
        (("loss=dad",), ()),
        (("loss=dad", "detached=false"), ("loss=dad",)),
        (("hidden_mse=0.1",), ()),
    ],
)
def test_every_loss_brings_predictions_closer(
    options: tuple[str, ...], others: tuple[str, ...], tmp_path: Path, text: Path
) -> None:
    teacher, student = make_pair(tmp_path, text)
    outcome, other = (
        train(student, teacher, tmp_path / name, text, *(f"distill.{option}" for option in sets)).outcome
        for name, sets in (("options", options), ("others", others))
    )
    assert outcome.after < 0.97 * outcome.before
    assert outcome.after != other.after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sets", "commits"),
    [
        (("distill.train=[tables, weights]", "distill.accumulate=2"), 6),  # tokens, four judgements, the weights
        (("distill.teacher_top_k=8",), 7),  # and the teacher's predictions
        (("distill.scope=block",), 4),  # tokens, two blocks, the weights
    ],
)
def test_interrupted_after_every_commit_gives_the_same_bytes(
    sets: tuple[str, ...], commits: int, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = make_pair(tmp_path, text)
    train(student, teacher, tmp_path / "whole", text, *sets)
    stops = in_pieces(
        lambda: train(student, teacher, tmp_path / "pieces", text, *sets), tmp_path / "pieces", monkeypatch
    )
    assert stops == commits
    whole, pieces = (tmp_path / name / "model.safetensors" for name in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()


@pytest.mark.slow
def test_batches_in_parts_and_blocks_run_again_change_nothing(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    curves = [
        held_out_losses(train(student, teacher, tmp_path / str(number), text, "dtype=float32", *sets))
        for number, sets in enumerate(
            [(), ("distill.batch_tokens=128", "distill.accumulate=2"), ("distill.checkpointing=false",)]
        )
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[2] == curves[0]


@pytest.mark.slow
def test_a_teacher_cached_in_full_gives_the_same_training(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    live, cached, truncated = (
        train(student, teacher, tmp_path / str(number), text, "dtype=float32", *sets)
        for number, sets in enumerate([(), ("distill.teacher_top_k=319",), ("distill.teacher_top_k=8",)])
    )
    assert held_out_losses(cached) == pytest.approx(held_out_losses(live), rel=1e-3)
    kl = held_out_losses(truncated)
    assert kl[0] is not None and held_out_losses(live)[0] is not None
    assert kl[0] < 0.98 * live.outcome.before, "merging tokens into one class lowers KL"


@pytest.mark.slow
def test_blocks_one_by_one(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    out = tmp_path / "out"
    result = train(student, teacher, out, text, "distill.scope=block", "dtype=float32")
    assert len(result.blocks) == 2
    assert all(block.after < 0.97 * block.before for block in result.blocks)
    assert result.outcome.after < 0.95 * result.outcome.before
    assert result.outcome.after == pytest.approx(result.blocks[1].after, rel=1e-3), "the loss of the last block is KL"
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    whole = train(student, teacher, tmp_path / "whole", text, "dtype=float32")
    assert result.outcome.before == pytest.approx(whole.outcome.before, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_block_that_stayed_dense(scope: str, tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text, overrides=[{"match": "model.layers.0.*", "dense": True}])
    out = tmp_path / "out"
    result = train(student, teacher, out, text, f"distill.scope={scope}")
    assert verify(out).layers == 7
    assert result.outcome.after < result.outcome.before
    if scope == "block":
        dense = result.blocks[0]
        assert dense.steps == 0
        assert dense.before == pytest.approx(0, abs=1e-6), "its inputs and outputs are the teacher's"


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["model", "block"])
def test_the_training_is_drawn(scope: str, tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    result = train(student, teacher, tmp_path / "out", text, f"distill.scope={scope}")
    assert result.plot is not None
    assert (tmp_path / "out" / result.plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_ends_early_where_nothing_is_gained(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    result = train(student, teacher, tmp_path / "out", text, "distill.tables_lr=30", "distill.patience=2")
    assert result.outcome.steps == 12
    assert result.outcome.stopped == "stopped early after step 12: no better for 2 judgements"


@pytest.mark.slow
def test_other_text_than_that_of_calibration(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    sets = ("distill.data=self", "distill.samples=10", "distill.seq_len=16", "calibration.data=nowhere.txt")
    train(student, teacher, tmp_path / "out", text, *sets)
    manifest = json.loads((tmp_path / "out" / "qcli.manifest.json").read_text())
    assert manifest["distilled"][0]["text"] == {"data": "self", "samples": 10, "seq_len": 16, "held_out": 4}
    assert manifest["recipe"]["distill"]["data"] == "self"


@pytest.mark.slow
def test_text_a_student_was_distilled_on_is_refused_or_flagged(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    folder, out = tmp_path / "tokens", tmp_path / "out"
    flags = {"model": str(teacher), "calibration.data": str(text), "calibration.samples": 12, "calibration.seq_len": 32}
    calibrate(load_recipe(None, flags), folder)
    train(student, teacher, out, text, f"distill.data={folder}")
    with pytest.raises(UsageError, match="was distilled on .*tokens"):
        evaluate(str(out), EvalOptions([str(folder)], window=32))
    assert evaluate(str(out), EvalOptions([str(text)], window=32)).fitted_to == [str(text)]
    assert evaluate(str(teacher), EvalOptions([str(text)], window=32)).fitted_to == []


def test_the_plan_is_what_is_done(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    flags = {"model": str(teacher), "calibration.data": str(text), "distill.steps": 24, "calibration.seq_len": 32}
    for train, latents in (("[tables]", False), ("[tables, weights]", True)):
        plan = plan_distillation(
            student, load_recipe(None, flags, (f"distill.train={train}", "distill.batch_tokens=256"))
        )
        source = open_source(str(student))
        assert isinstance(source, NativeSource)
        weights = {name: source.read_quantized(name) for name in source.quantized}
        entries = sum(table.numel() for weight in weights.values() for table in weight.tables.values())
        assert plan.layers == len(weights) == 14
        assert plan.weights == sum(weight.codes.numel() for weight in weights.values())
        assert plan.trained == entries + (plan.weights if latents else 0)
        assert plan.tokens == 24 * 256
        assert plan.memory.peak >= plan.weights * (21 if latents else 1)


@pytest.mark.slow
def test_too_little_memory_fails_before_any_work(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = make_pair(tmp_path, text)
    with pytest.raises(ResourceError, match="this distillation needs about .* --max-memory allows 2MB") as caught:
        train(student, teacher, tmp_path / "out", text, "max_memory=2MB")
    assert "--scope block" in str(caught.value.hint)
    blockwise = "distill.scope=block", "distill.train=[tables, weights]"
    with pytest.raises(ResourceError) as caught:
        train(student, teacher, tmp_path / "out", text, "max_memory=2MB", *blockwise)
    assert str(caught.value.hint).startswith("--train tables needs less; a smaller distill.batch_tokens")
    assert not (tmp_path / "out.partial").exists()
    monkeypatch.setattr(blockwise_module, "BatchMemory", lambda device, on_host: BatchMemory(device, on_host=True))
    on_host = train(student, teacher, tmp_path / "out", text, "distill.scope=block")
    monkeypatch.undo()
    assert train(student, teacher, tmp_path / "there", text, "distill.scope=block").blocks == on_host.blocks


@pytest.mark.slow
def test_students_that_do_not_learn_stay_as_they_were(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    result = train(student, teacher, tmp_path / "out", text, "distill.tables_lr=30")
    assert (result.outcome.best_step, result.outcome.after) == (0, result.outcome.before)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()


def test_distillations_that_are_impossible_are_refused(tmp_path: Path, text: Path) -> None:
    teacher, student = make_pair(tmp_path, text)
    other = tiny_model("llama", tmp_path, num_hidden_layers=1)
    with pytest.raises(UsageError, match="its layers or its vocabulary differ"):
        train(student, other, tmp_path / "out", text)
    with pytest.raises(UsageError, match="is not a checkpoint that qcli wrote"):
        train(teacher, teacher, tmp_path / "out", text)
    wider = tiny_model("llama", tmp_path, vocab_size=384)
    with pytest.raises(UsageError, match="or its vocabulary differ"):
        train(student, wider, tmp_path / "out", text)
    with pytest.raises(UsageError, match="none is left"):
        train(student, teacher, tmp_path / "out", text, "calibration.held_out=28")
    with pytest.raises(UsageError, match=r"distill\.samples=3: training holds out 4 of 3"):
        train(student, teacher, tmp_path / "out", text, "distill.samples=3")
    few = tmp_path / "few"
    flags = {"model": str(teacher), "calibration.data": str(text), "calibration.samples": 4, "calibration.seq_len": 32}
    calibrate(load_recipe(None, flags), few)
    with pytest.raises(UsageError, match="has 4 samples and 4 are held out"):
        train(student, teacher, tmp_path / "few-out", text, f"distill.data={few}")
    for wrong, problem in (
        ("train=[]", "train must name"),
        ("teacher_top_k=320", "320 is not below the vocabulary of 320"),
        ("hidden: 1, teacher_top_k: 8", "caches no hidden states"),
        ("temperature: 2, teacher_top_k: 8", "at temperature 1 only"),
        ("scope: block, teacher_top_k: 8", "needs scope: model"),
    ):
        flag = f"distill={{{wrong}}}" if ":" in wrong else f"distill.{wrong}"
        with pytest.raises(UsageError, match=problem):
            train(student, teacher, tmp_path / "out", text, flag)
    assert not (tmp_path / "out").exists()


def test_begin_tokens_reach_every_text_and_are_recorded(tmp_path: Path, text: Path) -> None:
    """Those of the calibration, of its folder and of the distillation; what `bos` decides is part of a run's state."""
    teacher, student = with_bos(tiny_model("llama", tmp_path)), tmp_path / "student"
    run(teacher, student, text, method__name="gptq-like", method__bits=2)
    assert Manifest.read(student).calibration_bos is True
    sets = ("distill.steps=2", "distill.judgements=1", "calibration.samples=6")
    train(student, teacher, tmp_path / "begins", text, *sets)
    train(student, teacher, tmp_path / "plain", text, *sets, "bos=false")
    assert [Manifest.read(tmp_path / name).distilled[0].bos for name in ("begins", "plain")] == [True, False]
    run(teacher, tmp_path / "without", text, method__name="gptq-like", method__bits=2, bos=False)
    manifest = Manifest.read(tmp_path / "without")
    assert (manifest.calibration_bos, manifest.recipe["bos"]) == (False, False)
    assert manifest.calibration_tokens_sha256 != Manifest.read(student).calibration_tokens_sha256
    flags = {"model": str(teacher), "calibration.data": str(text), "calibration.samples": 6, "calibration.seq_len": 32}
    calibrate(load_recipe(None, flags), tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "calibration.json").read_text())["bos"] is True
    assert load_file(tmp_path / "folder" / "tokens.safetensors")["ids"][:, 0].tolist() == [0] * 6

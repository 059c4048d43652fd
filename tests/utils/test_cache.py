"""Cached results are returned by key, and computed again where their file is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.models.stream import ModelStream
from qcli.utils import cache as module
from qcli.utils.cache import Cache, default_folder
from tests.quantizing import run, write_text
from tests.tiny import tiny_model


def test_results_are_cached_by_key(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path / "cache"), []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return {"a": torch.arange(4.0)}

    for key in ({"x": 1}, {"x": 1}, {"x": 2}):
        assert torch.equal(cache.tensors(key, make)["a"], torch.arange(4.0))
    assert len(made) == 2
    assert [cache.values({"y": 1}, lambda: [1, None]), cache.values({"y": 1}, lambda: 1 / 0)] == [[1, None]] * 2
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(cache.tensors({"x": 1}, make)["a"], torch.arange(4.0))
    assert cache.values({"y": 1}, lambda: "again") == "again"
    assert len(made) == 3


def test_without_a_usable_folder_nothing_is_cached(tmp_path: Path) -> None:
    counter = iter((1, 2))
    assert [Cache(None).values({}, lambda: next(counter)) for _ in range(2)] == [1, 2]
    file = tmp_path / "file"
    file.write_text("no folder")
    assert Cache(file / "below").values({}, lambda: 3) == 3


def test_the_least_recently_used_result_is_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMIT", 2500)
    cache = Cache(tmp_path)
    for number in range(3):
        cache.tensors({"n": number}, lambda: {"a": torch.zeros(200)})
        for age, file in enumerate(sorted(tmp_path.iterdir(), key=lambda f: f.stat().st_mtime_ns, reverse=True)):
            os.utime(file, (1000 - age, 1000 - age))
        cache.tensors({"n": 0}, lambda: {"a": torch.ones(200)})
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(cache.tensors({"n": 0}, lambda: {"a": torch.ones(200)})["a"], torch.zeros(200)), (
        "it was used most recently"
    )


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCLI_CACHE", "here")
    assert default_folder() == Path("here")
    monkeypatch.delenv("QCLI_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "there")
    assert default_folder() == Path("there/qcli")


def test_baselines_are_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, small = tiny_model("llama", tmp_path), write_text(tmp_path), tmp_path / "small"
    run(model, small, method__name="rtn", method__bits=3)
    loaded: list[str] = []
    load_block = ModelStream.load_block

    def counted(self: ModelStream, index: int) -> torch.nn.Module:
        loaded.append(self.source.path.name)
        return load_block(self, index)

    monkeypatch.setattr(ModelStream, "load_block", counted)
    cache = Cache(tmp_path / "cache")
    scores = [
        evaluate(str(small), EvalOptions([str(text)], window=32, max_windows=3), baseline=str(model), cache=cache)
        for _ in range(2)
    ]
    assert scores[0] == scores[1]
    assert loaded == [model.name, model.name, "small", "small", "small", "small"]
    other = tiny_model("llama", tmp_path, rms_norm_eps=1e-3)
    evaluate(str(small), EvalOptions([str(text)], window=32, max_windows=3), baseline=str(other), cache=cache)
    assert loaded.count(other.name) == 2, "a different model is evaluated"

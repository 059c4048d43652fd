"""Cached results are returned by key, and computed again where their file is damaged."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcli.data import datasets
from qcli.data.identity import content_key
from qcli.evaluation.evaluate import _Evaluator, evaluate
from qcli.evaluation.options import EvalOptions
from qcli.models.open import open_source
from qcli.models.stream import ModelStream
from qcli.utils import cache as module
from qcli.utils.cache import Cache, default_folder
from qcli.utils.errors import QcliWarning, StateError
from qcli.utils.progress import silent
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


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "exchanged"])
def test_damaged_results_are_made_again_and_told(damage: str, tmp_path: Path) -> None:
    cache, folder = Cache(tmp_path / "cache"), tmp_path / "cache"
    for number in (1, 2):
        cache.tensors({"x": number}, lambda: {"a": torch.zeros(100)})
        cache.values({"x": number}, lambda: [0] * 100)
    for suffix in ("json", "safetensors"):
        files = list(folder.glob(f"*.{suffix}"))
        contents = [file.read_bytes() for file in files]
        for file, other in zip(files, reversed(contents), strict=True):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            cut = file.read_bytes()[:-3]
            file.write_bytes({"bit": bytes(content), "cut": cut, "empty": b"", "exchanged": other}[damage])
    with pytest.warns(QcliWarning, match=r"json is damaged.*: recomputing it"):
        assert cache.values({"x": 1}, lambda: "again") == "again"
    with pytest.warns(QcliWarning, match=r"safetensors is .*: recomputing it"):
        assert torch.equal(cache.tensors({"x": 1}, lambda: {"a": torch.ones(2)})["a"], torch.ones(2))
    assert cache.values({"x": 1}, lambda: 1 / 0) == "again"
    assert torch.equal(cache.tensors({"x": 1}, dict)["a"], torch.ones(2))


def test_results_of_other_shapes_than_expected_are_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.tensors({}, lambda: {"a": torch.zeros(2)})
    with pytest.warns(QcliWarning, match="unexpected shapes"):
        made = cache.tensors({}, lambda: {"a": torch.ones(3)}, lambda tensors: tensors["a"].shape == (3,))
    assert torch.equal(made["a"], torch.ones(3))


def test_a_folder_of_the_users_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    with pytest.raises(StateError, match="the cache cannot be used: .*thesis contains files"):
        Cache(tmp_path / "thesis")
    old = tmp_path / "old"
    old.mkdir()
    (old / f"{'0' * 64}.safetensors").touch()  # earlier versions left no marker
    (tmp_path / "link").symlink_to(old)
    Cache(tmp_path / "link").values({}, lambda: 1)
    assert (old / ".qcli-cache").is_file()
    (old / "mine").touch()
    assert Cache(old).values({}, lambda: 2) == 1


def test_what_is_not_of_the_cache_is_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.tensors({"n": 0}, lambda: {"a": torch.zeros(200)})
    for name in ("mine.safetensors", "notes"):
        (tmp_path / name).write_bytes(bytes(5000))
        os.utime(tmp_path / name, (0, 0))
    monkeypatch.setattr(module, "_LIMIT", 1000)
    cache.tensors({"n": 1}, lambda: {"a": torch.zeros(200)})
    assert {"mine.safetensors", "notes", ".qcli-cache"} < {file.name for file in tmp_path.iterdir()}
    assert len(list(tmp_path.glob("[0-9a-f]" * 64 + ".safetensors"))) == 1


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
        results = list(tmp_path.glob("*.safetensors"))
        for age, file in enumerate(sorted(results, key=lambda f: f.stat().st_mtime_ns, reverse=True)):
            os.utime(file, (1000 - age, 1000 - age))
        cache.tensors({"n": 0}, lambda: {"a": torch.ones(200)})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
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


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_windows_of_other_shapes_have_results_of_their_own(order: int, tmp_path: Path) -> None:
    """The same tokens in all: 4 windows of 32, or 8 of 16."""
    model, text, small, cache = tiny_model("llama", tmp_path), write_text(tmp_path), tmp_path / "small", tmp_path / "c"
    run(model, small, method__name="rtn", method__bits=3)
    for window, count in [(32, 4), (16, 8)][::order]:
        options = EvalOptions([str(text)], window=window, max_windows=count)
        cached, alone = (
            evaluate(str(small), options, baseline=str(model), cache=Cache(folder)) for folder in (cache, None)
        )
        assert cached == alone


def test_keys_change_with_everything_that_results_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    source = open_source(str(model))
    keys: list[object] = []

    def keep() -> None:
        keys.append(content_key(str(text), source, calibration=True))

    keep()
    for name in ("tokenizer.json", "tokenizer_config.json", "x.model", "x.tiktoken"):
        (model / name).write_text((model / name).read_text() + " " if (model / name).exists() else "x")
        keep()
    (model / "x.model").rename(model / "y.model")
    keep()
    source.config["tokenizer_class"] = "other"
    keep()
    text.write_text("other")
    keep()
    assert len({str(key) for key in keys}) == len(keys)
    texts = iter(("before", "after"))
    monkeypatch.setattr(datasets, "_read_named", lambda name, calibration: next(texts))
    named = []
    for _ in range(2):
        datasets.named_sha256.cache_clear()
        named.append(str(content_key("wikitext2", source, calibration=True)))
    datasets.named_sha256.cache_clear()
    assert named[0] != named[1]


def test_task_results_are_those_of_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []

    def values(self: Cache, key: object, make: object) -> dict[str, Any]:
        keys.append(str(key))
        return {}

    monkeypatch.setattr(Cache, "values", values)
    model = tiny_model("llama", tmp_path)
    for _ in range(2):
        tasks: Any = SimpleNamespace(key={})
        evaluator = _Evaluator(EvalOptions([], tasks=tasks), [], torch.device("cpu"), torch.float32, silent)
        evaluator.tasks("model", open_source(str(model)), Cache(tmp_path / "cache"))
        (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    assert keys[0] != keys[1]

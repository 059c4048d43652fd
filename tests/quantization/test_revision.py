"""A revision of a hub model: opened, and named in what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcli.models.manifest import RECIPE, Manifest
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UsageError
from tests.models.test_folder import Hub
from tests.quantizing import run
from tests.tiny import tiny_model


def test_the_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = tiny_model("llama", tmp_path).rename(tmp_path / "0123abc")
    hub = Hub(commit, monkeypatch)
    recipe = load_recipe(None, {"model": "org/name", "revision": "v1.0"})
    assert recipe.source == "org/name@v1.0"
    run(Path("org/name"), tmp_path / "q", method__name="rtn", revision="v1.0")
    assert "v1.0" in hub.revisions
    source = Manifest.read(tmp_path / "q").source
    assert (source.model, source.revision) == ("org/name", "0123abc")
    card = (tmp_path / "q" / "README.md").read_text()
    assert "base_model: org/name\n" in card
    assert "| base model | `org/name` at `0123abc` |" in card
    assert "revision: v1.0" in (tmp_path / "q" / RECIPE).read_text()


def test_a_local_model_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a hub id, it has no revision main"):
        run(tiny_model("llama", tmp_path), tmp_path / "q", method__name="rtn", revision="main")


def test_revisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="revision"):
        load_recipe(None, {"model": "org/name", "revision": "a b"})

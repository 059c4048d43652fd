"""What checkpoints say of how they were made: the same on every machine and in every folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcli.distillation.distill import distill
from qcli.export.pack import pack
from qcli.models.manifest import Manifest
from qcli.recipe.load import load_recipe
from qcli.recipe.record import portable, portable_manifest
from qcli.recipe.yaml import read_yaml
from qcli.utils.paths import expanded, portable_name
from tests.quantizing import run, weights, write_text
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(
            ("/data/models/llama", "llama"),
            ("~/models/llama/", "llama"),
            ("../x/llama", "llama"),
            ("C:\\m\\llama", "llama"),
        ),
        *(("org/name", "org/name"), ("wikitext2", "wikitext2"), ("self", "self"), ("texts/a.txt", "a.txt")),
        ("/root/.cache/huggingface/hub/models--org--name/snapshots/0123abcd", "org/name"),
    ],
)
def test_names_without_folders(text: str, name: str) -> None:
    assert portable_name(text) == name
    assert portable_name(name) == name


def test_a_relative_folder_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert portable_name("org/name") == "name"
    assert portable_name(".") == tmp_path.name


def test_every_path_of_a_recipe_is_renamed() -> None:
    given: dict[str, Any] = {
        "model": "/m/a",
        "out": "/o",
        "resume": "required",
        "calibration.data": "/t/a.txt",
        "distill.data": "/t/b.txt",
        "eval.perplexity": ["/t/c.txt", "wikitext2"],
        "eval.baseline": "/m/b",
        "eval.include_path": "/t/tasks",
        "eval.tasks": ["mine"],
    }
    recipe = load_recipe(None, given)
    fields = portable(recipe.to_dict())
    assert "/" not in str(fields)
    assert fields["eval"]["perplexity"] == ["c.txt", "wikitext2"]
    assert {"out", "resume"}.isdisjoint(fields)
    assert load_recipe(None, {}, [f"model={fields['model']}"]).model == "a"


def test_home_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"model": "~/m", "out": "~/o", "calibration.data": "~/t.txt", "distill.data": "~/d.txt"}
    given |= {"eval.baseline": "~/b", "eval.include_path": "~/i"}
    recipe = load_recipe(None, given, ["eval.perplexity=[~/p.txt, c4]"])
    assert "~" not in str(recipe.to_dict())
    assert recipe.model == "/home/me/m"
    assert recipe.eval is not None and recipe.eval.perplexity == ["/home/me/p.txt", "c4"]
    assert expanded("a~b") == "a~b"


def test_out_changes_no_byte_and_no_path_is_recorded(tmp_path: Path) -> None:
    model, text = tiny_model("llama", tmp_path), write_text(tmp_path)
    folders = [tmp_path / "a", tmp_path / "elsewhere" / "b"]
    for folder in folders:
        folder.parent.mkdir(exist_ok=True)
        run(model, folder, text, method__bits=3)
    assert weights(folders[0]) == weights(folders[1])
    assert Manifest.read(folders[0]).model_copy(update={"seconds": 0, "peak_memory": {}}) == Manifest.read(
        folders[1]
    ).model_copy(update={"seconds": 0, "peak_memory": {}})
    options = load_recipe(
        None, {"model": str(model), "distill.steps": 1, "distill.data": str(text), "distill.seq_len": 32}
    )
    distill(folders[0], options, tmp_path / "distilled")
    pack(tmp_path / "distilled", tmp_path / "packed", format="dense", shard_size=10**9)
    for folder in (*folders, tmp_path / "distilled", tmp_path / "packed"):
        for file in folder.rglob("*"):
            assert str(tmp_path).encode() not in file.read_bytes(), file
        recipe = read_yaml((folder / "recipe.yaml").read_text(), "recipe.yaml").data
        assert recipe["model"] == model.name and recipe["calibration"]["data"] == text.name
        manifest = Manifest.read(folder)
        assert manifest.source.fingerprint in (folder / "recipe.yaml").read_text()
        assert str(manifest.calibration_text_identity) in (folder / "recipe.yaml").read_text()
    assert manifest.distilled[0].teacher == model.name


def test_native_folders_have_a_card_that_tells_how_to_load_them(tmp_path: Path) -> None:
    model, out = tiny_model("llama", tmp_path), tmp_path / "out"
    run(model, out, method__name="rtn")
    card = (out / "README.md").read_text()
    assert "import qcli" in card and "AutoModelForCausalLM.from_pretrained" in card
    assert "rtn (4 bits, groups of 32)" in card and (out / "recipe.yaml").read_text().strip() in card
    assert "README.md" in Manifest.read(out).files


def test_names_that_are_markup_or_control_codes_are_escaped_in_cards(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path).rename(tmp_path / "a|b`<img src=x>\x1b[31m\n# evil")
    run(model, tmp_path / "out", method__name="rtn")
    for file in ("README.md", "recipe.yaml"):
        text = (tmp_path / "out" / file).read_text()
        assert "\x1b" not in text and "\n# evil" not in text
    (title,) = [line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("# ")]
    assert title == r"# a\|b\`\<img src=x\>\\x1b\[31m \# evil, quantized by qcli"


def test_paths_of_older_manifests_are_left_out(tmp_path: Path) -> None:
    run(tiny_model("llama", tmp_path), tmp_path / "out", method__name="rtn")
    manifest = Manifest.read(tmp_path / "out")
    old = manifest.model_copy(
        update={"recipe": manifest.recipe | {"model": "/home/me/x", "out": "/o", "resume": "auto"}}
    )
    assert portable_manifest(old).recipe == manifest.recipe | {"model": "x"}


def test_paths_in_mappings_and_lists_are_portable() -> None:
    recipe = {
        "calibration": {"data": [{"path": "/t/a.csv", "column": "body"}, {"path": "c4"}]},
        "eval": {"perplexity": ["/t/c.txt", {"path": "/t/d.json", "template": "{a}"}]},
    }
    fields = portable(recipe)
    assert fields["calibration"]["data"] == [{"path": "a.csv", "column": "body"}, {"path": "c4"}]
    assert fields["eval"]["perplexity"] == ["c.txt", {"path": "d.json", "template": "{a}"}]

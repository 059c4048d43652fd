"""Every recipe that is shipped runs, on a tiny model and a little text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qcli
from qcli.recipe.load import load_recipe
from qcli.recipe.plugins import METHODS
from qcli.utils import registry
from tests.cli.conftest import Invoke
from tests.tiny import with_merge

pytestmark = pytest.mark.slow

WITHOUT_GROUPS = ("fp8", "full-precision", "nvfp4", "onebit")
RECIPES = sorted((Path(qcli.__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_recipe_quantizes(invoke: Invoke, recipe: Path, model: Path, text: Path, tmp_path: Path) -> None:
    small: tuple[object, ...] = ("--data", text, "--samples", 6, "--seq-len", 32)
    small += () if recipe.stem in WITHOUT_GROUPS else ("--group-size", 32)
    described = recipe.read_text()
    small += ("--set", "refine.steps=4") if "refine:" in described else ()
    small += ("--set", "method.steps=4") if " steps:" in described.partition("method:")[2].partition("\n")[0] else ()
    small += ("--set", "low_rank.rank=2") if "low_rank:" in described else ()
    small += tuple(f"--set={name}.group_size=32" for name in ("lm_head", "embeddings") if f"{name}:" in described)
    code, out, err = invoke("quantize", model, "--recipe", recipe, *small, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert len(json.loads(out)["layers"]) == 14


@pytest.mark.parametrize("recipe", [file for file in RECIPES if "distill:" in file.read_text()], ids=lambda f: f.stem)
def test_recipe_distills(invoke: Invoke, recipe: Path, model: Path, text: Path, tmp_path: Path) -> None:
    sizes = {"calibration.samples": 6, "calibration.seq_len": 32, "distill.samples": 6, "distill.seq_len": 32}
    steps = {"refine.steps": 4} if "refine:" in recipe.read_text() else {}
    steps |= {"method.steps": 4} if recipe.stem == "w2-distilled" else {}
    group = {} if recipe.stem in WITHOUT_GROUPS else {"method.group_size": 32}
    fields = {"model": model, "calibration.data": text, "distill.steps": 4, **sizes, **steps, **group}
    fields |= {"eval.perplexity": f"[{text}]", "eval.window": 32}
    sets = [argument for name, value in fields.items() for argument in ("--set", f"{name}={value}")]
    code, out, err = invoke("run", recipe, *sets, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["distilled"]["outcome"]["steps"] == 4
    assert result["eval"]["model"].endswith("distilled")


@pytest.mark.parametrize("recipe", [file for file in RECIPES if "pack:" in file.read_text()], ids=lambda f: f.stem)
def test_recipe_packs(invoke: Invoke, recipe: Path, model: Path, text: Path, tmp_path: Path) -> None:
    fields = {"model": with_merge(model), "calibration.data": text, "calibration.samples": 6, "calibration.seq_len": 32}
    fields |= {} if recipe.stem in WITHOUT_GROUPS else {"method.group_size": 32}
    fields |= {"eval.perplexity": f"[{text}]", "eval.window": 32}
    fields |= {f"{name}.group_size": 32 for name in ("lm_head", "embeddings") if f"{name}:" in recipe.read_text()}
    sets = [argument for name, value in fields.items() for argument in ("--set", f"{name}={value}")]
    code, out, err = invoke("run", recipe, *sets, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    pack = load_recipe(recipe, {}).pack
    assert pack is not None and json.loads(out)["packed"]["format"] == pack.format


def test_there_is_one_for_every_method() -> None:
    assert set(registry.names(METHODS)) <= {recipe.stem for recipe in RECIPES}

"""The assignment of methods to layers, and what in a recipe does not fit the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcli.algorithms.methods.rtn import RTN
from qcli.models.families import Linear
from qcli.recipe.assign import assign
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UsageError

LAYERS = [
    Linear(f"model.layers.{block}.mlp.{name}", block, group, shape)
    for block in range(3)
    for group, (name, shape) in enumerate([("up_proj", (96, 64)), ("down_proj", (64, 96))])
]


def test_the_first_matching_override_applies() -> None:
    recipe = load_recipe(
        None,
        {"model": "m", "method.name": "rtn", "method.group_size": 32},
        ["overrides=[{match: '*.0.*', dense: true}, {match: '*.down_proj', method: {bits: 8}}]"],
    )
    assigned = assign(recipe, LAYERS)
    assert list(assigned) == [layer.name for layer in LAYERS]
    assert assigned["model.layers.0.mlp.down_proj"] is None
    assert assigned["model.layers.1.mlp.down_proj"] == RTN(bits=8, group_size=32)
    assert assigned["model.layers.2.mlp.up_proj"] == RTN(group_size=32)


def test_everything_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: m\nmethod: {name: rtn, group_size: 64}\noverrides:\n"
        "  - {match: '*.q_proj', dense: true}\n"
        "  - {match: '*.0.*', dense: true}\n"
        "  - {match: '*.0.mlp.up_proj', method: {bits: 8}}\n",
    )
    recipe = load_recipe(file, {})
    with pytest.raises(UsageError) as caught:
        assign(recipe, LAYERS)
    assert caught.value.message.splitlines() == [
        f"{file}:2:21: method.group_size: groups of 64 do not divide its 96 inputs: "
        "model.layers.*.mlp.down_proj (2 layers)",
        f"{file}:4:6: overrides[0].match: '*.q_proj' matches no layer",
        f"{file}:6:6: overrides[2].match: '*.0.mlp.up_proj' matches only layers that earlier overrides take",
    ]
    assert caught.value.hint == "`group_size: 32` divides every row; `group_tail: ragged` allows a shorter last group"


def test_no_hint_proposes_tiny_groups() -> None:
    with pytest.raises(UsageError, match="groups of 64 do not divide its 172 inputs") as caught:
        assign(load_recipe(None, {"model": "m"}), [Linear("down_proj", 0, 0, (64, 172))])
    assert caught.value.hint == "--group-tail ragged allows a shorter last group"


@pytest.mark.parametrize(("format", "stored"), [("qcli", True), ("dense", True), ("gguf", False), ("gptq", False)])
def test_no_hint_proposes_groups_that_the_pack_does_not_store(format: str, stored: bool) -> None:
    with pytest.raises(UsageError) as caught:
        assign(load_recipe(None, {"model": "m"}, [f"pack.format={format}"]), [Linear("o", 0, 0, (64, 96))])
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("--group-size 32 divides every row")
    assert ("ragged" in caught.value.hint) == stored


def test_a_recipe_that_quantizes_nothing_is_refused() -> None:
    recipe = load_recipe(None, {"model": "m"}, ["overrides=[{match: '*', dense: true}]"])
    with pytest.raises(UsageError, match="nothing to quantize"):
        assign(recipe, LAYERS)

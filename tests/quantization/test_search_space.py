"""The search space of `bits: auto`: candidates, sizes, the recipe of an assignment, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcli.models.families import Linear
from qcli.quantization.search_space import search_space
from qcli.recipe.assign import assign
from qcli.recipe.load import load_recipe
from qcli.recipe.recipe import Recipe
from qcli.utils.errors import UsageError

AUTO = {"method.bits": "auto", "method.target_bpw": 3.8, "method.group_size": 32, "method.name": "rtn"}


LAYERS = [
    Linear(f"model.layers.{block}.mlp.{name}", block, 0, shape)
    for block in range(3)
    for name, shape in (("up_proj", (128, 64)), ("down_proj", (64, 128)))
]


def recipe(**fields: Any) -> Recipe:
    return load_recipe(None, {"model": "m", **AUTO, **fields})


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_the_recipe_of_an_assignment_gives_each_layer_its_candidate(picked: list[int]) -> None:
    override = {"match": "*.1.mlp.up_proj", "method": {"bits": 8}}
    space = search_space(recipe(overrides=[override]), LAYERS)
    chosen = {layer.name: picked[i] % len(space.candidates) for i, layer in enumerate(space.layers)}
    assigned = assign(space.recipe_of(chosen), LAYERS)
    assert {name: assigned[name] for name in chosen} == {name: space.candidates[n] for name, n in chosen.items()}
    fixed = assigned["model.layers.1.mlp.up_proj"]
    assert fixed is not None and fixed.format.bits == 8 and len(assigned) == len(chosen) + 1


@pytest.mark.parametrize("groups", [32, "auto"])
def test_candidates_have_the_widths_and_groups_left_open(groups: Any, tmp_path: Path) -> None:
    before = recipe(**{"method.group_size": groups})
    file = tmp_path / "recipe.yaml"
    file.write_text(before.to_yaml())
    assert load_recipe(file, {}) == before
    assert before.to_dict()["method"]["bits"] == "auto"
    space = search_space(before, LAYERS)
    sizes = [method.model_dump()["group_size"] for method in space.candidates]
    assert set(sizes) == ({32} if groups == 32 else {32, 64, 128})
    narrow = space.sizes["model.layers.0.mlp.up_proj"]
    assert [bits is None for bits in narrow] == [size == 128 for size in sizes], "it is 64 wide"


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"method.target_bpw": None}, "method.target_bpw: required"),
        ({"method.fused": "yes"}, "--fused: must be true or false"),
        ({"method.bits": 3, "method.target_bpw": None, "method.fused": True}, "fused: needs bits: auto"),
        ({"method.bits": 3}, "--target-bpw: needs bits: auto"),
        ({"method.bits": 3, "method.target_bpw": None, "method.group_size": "auto"}, "--group-size: auto needs bits"),
        ({"method.target_bpw": 2.2}, r"--target-bpw: must be within 2\.56\d* and 8\.75, the range of rtn"),
        ({"method.target_bpw": 9}, "--target-bpw: must be within"),
        ({"method.name": "onebit", "method.group_size": None}, "--bits: auto: onebit has only one width"),
        ({"overrides": [{"match": "*", "method": {"symmetric": True}}]}, "must set bits"),
        ({"low_rank": {"rank": 64}}, r"low_rank\.rank 64 must be below 64, .*: model\.layers\.0\.mlp\.up_proj"),
        ({"overrides": [{"match": "*", "dense": True}]}, "overrides take every layer"),
    ],
)
def test_targets_and_methods_without_a_choice_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        search_space(recipe(**fields), LAYERS)

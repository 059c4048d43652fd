"""The recipe as a record: validation of plain data, overrides, allocation, and the round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.rtn import RTN
from qcli.algorithms.transforms.teq import TEQ
from qcli.recipe.allocation import Allocation
from qcli.recipe.errors import issues
from qcli.recipe.load import load_recipe
from qcli.recipe.recipe import Recipe
from qcli.recipe.yaml import dotted, read_yaml
from qcli.utils.errors import UsageError


def refusals(data: Any) -> list[str]:
    """What is wrong with plain data, by path."""
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(data)
    return [f"{dotted(issue.path)}: {issue.message}" for issue in issues(caught.value, Recipe)]


def test_plain_data_and_instances_are_one_recipe() -> None:
    plain = Recipe.model_validate(
        {"model": "m", "method": {"name": "rtn", "bits": 3}, "transforms": ["teq", {"name": "teq", "steps": 5}]}
    )
    assert plain == Recipe(model="m", method=RTN(bits=3), transforms=[TEQ(), TEQ(steps=5)])
    assert plain.allocation is None
    assert Recipe.model_validate({"model": "m"}).method == GPTQLike()


def test_bits_auto_are_an_allocation() -> None:
    method = {"name": "rtn", "bits": "auto", "target_bpw": 3, "fused": True, "group_size": "auto", "symmetric": True}
    recipe = Recipe.model_validate({"model": "m", "method": method})
    assert recipe.method == RTN(symmetric=True)
    assert recipe.allocation == Allocation(target_bpw=3.0, groups=True, fused=True)
    assert recipe.to_dict()["method"] == RTN(symmetric=True).model_dump() | {"name": "rtn"} | method
    for key in (None, {"target_bpw": 3}):
        (line,) = refusals({"model": "m", "allocation": key})
        assert line.startswith("allocation: unknown key; known: model, revision, seed, ")
        assert "method, transforms, " in line, "it is no key itself"


GROUPED = st.fixed_dictionaries(
    {"name": st.sampled_from(["rtn", "gptq-like", "teq"])},
    optional={"bits": st.integers(2, 8), "group_size": st.sampled_from([-1, 32]), "symmetric": st.booleans()},
)


AUTO = st.fixed_dictionaries(
    {"bits": st.just("auto"), "target_bpw": st.floats(2, 8)},
    optional={"fused": st.booleans(), "group_size": st.sampled_from(["auto", 32]), "damping": st.floats(0.01, 1)},
)


OVERRIDES = st.fixed_dictionaries({"match": st.text(min_size=1)}) | st.fixed_dictionaries(
    {"match": st.text(min_size=1), "method": GROUPED}
)


RECIPES = st.fixed_dictionaries(
    {"model": st.text(min_size=1)},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "out": st.text(min_size=1),
        "calibration": st.fixed_dictionaries({"samples": st.integers(5, 9)}, optional={"data": st.text(min_size=1)}),
        "method": GROUPED | AUTO | st.just({"name": "onebit", "paper": True}),
        "transforms": st.lists(
            st.just("teq") | st.fixed_dictionaries({"name": st.just("teq"), "lr": st.floats(1e-6, 1.0)})
        ),
        "low_rank": st.fixed_dictionaries({}, optional={"bits": st.sampled_from([8, 16])}),
        "refine": st.fixed_dictionaries({}, optional={"train": st.just(["tables"])}),
        "activations": st.none() | st.fixed_dictionaries({"bits": st.integers(4, 8)}),
        "distill": st.fixed_dictionaries({"train": st.lists(st.sampled_from(["tables", "weights"]), min_size=1)}),
        "overrides": st.lists(OVERRIDES.map(lambda rule: rule if "method" in rule else rule | {"dense": True})),
        "pack": st.fixed_dictionaries({}, optional={"format": st.sampled_from(["dense", "gguf"])}),
        "eval": st.fixed_dictionaries({"gates": st.fixed_dictionaries({"max_kl": st.floats(0, 1e9)})}),
    },
)


@settings(deadline=None)
@given(RECIPES)
def test_a_recipe_survives_its_round_trip(data: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(data)
    assert Recipe.model_validate(recipe.to_dict()) == recipe
    assert Recipe.model_validate(read_yaml(recipe.to_yaml(), "recipe.yaml").data) == recipe


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"seed": "1"}, "seed: must be a whole number, not '1'"),
        ({"seed": True}, "seed: must be a whole number, not True"),
        ({"calibration": {"samples": 4.0}}, "calibration.samples: must be a whole number, not 4.0"),
        ({"low_rank": {"weighted": 1}}, "low_rank.weighted: must be true or false, not 1"),
        ({"method": {"symmetric": 1}}, "method.symmetric: must be true or false, not 1"),
        ({"method": {"residual": 1}}, "method.residual: must be true or false or 'auto', not 1"),
        ({"method": {"damping": "0.1"}}, "method.damping: must be a number, not '0.1'"),
        ({"refine": {"train": "tables"}}, "refine.train: must be a list, not 'tables'"),
        ({"transforms": [{"name": "teq", "steps": "3"}]}, "transforms[0].steps: must be a whole number, not '3'"),
        ({"transforms": [{"steps": 3}]}, "transforms[0]: must be a name, or a mapping as {name: teq, steps: 200}"),
        ({"method": {"damping": float("inf")}}, "method.damping: must be a finite number, not inf"),
        ({"method": 3}, "method: must be a mapping of keys to values, as {name: rtn, bits: 4}"),
        ({"method": {"bits": "auto", "target_bpw": "3"}}, "method.target_bpw: must be a number, not '3'"),
    ],
)
def test_values_are_taken_literally(fields: dict[str, Any], refusal: str) -> None:
    assert refusals({"model": "m"} | fields) == [refusal]


@pytest.mark.parametrize(
    ("method", "lines"),
    [
        ({"name": "onebit"}, ["overrides[0].method.bits: must be 1, not 3"]),
        (
            {"name": "onebit", "svid": "qr"},
            [
                "method.svid: must be 'power', 'svd' or 'nmf', not 'qr'",
                "overrides[0].method.bits: must be 1, not 3",
            ],
        ),
        ({"name": "gptq"}, ["method.name: unknown method 'gptq'; did you mean 'gptq-like'?"]),
    ],
)
def test_overrides_are_checked_against_the_method_they_change(method: dict[str, Any], lines: list[str]) -> None:
    overrides = [{"match": "a", "method": {"bits": 3}}, {"match": "b", "method": {"name": "rtn", "bits": 9}}]
    always = ["overrides[1].method.bits: must be at most 8, not 9"]
    assert refusals({"model": "m", "method": method, "overrides": overrides}) == lines + always


def test_overrides_change_only_what_they_name() -> None:
    recipe = load_recipe(
        None,
        {"model": "m", "method.name": "rtn", "method.bits": 3, "method.group_size": 32},
        [
            "method.grid=search",
            "overrides=[{match: a, method: {bits: 8}}, {match: b, method: {name: gptq-like}}, {match: c, dense: true}]",
        ],
    )
    assert recipe.override_methods() == [
        RTN(bits=8, group_size=32, grid="search"),
        GPTQLike(bits=3, group_size=32),
        None,
    ]


def test_fingerprint_ignores_what_does_not_change_the_bytes() -> None:
    flags = {"model": "m", "method.name": "rtn"}
    plain = load_recipe(None, flags)
    own = {"out": "x", "device": "cpu", "deterministic": False, "resume": "never"}
    elsewhere = load_recipe(None, flags | own, ["eval={}", "pack={}"])
    other = load_recipe(None, flags | {"seed": 1})
    assert plain.fingerprint_fields() == elsewhere.fingerprint_fields()
    assert plain.fingerprint_fields() != other.fingerprint_fields()


def test_recipes_are_frozen() -> None:
    recipe = load_recipe(None, {"model": "m"})
    with pytest.raises(ValidationError):
        recipe.seed = 1


def test_texts_are_names_mappings_or_lists_of_them() -> None:
    source = {"path": "a.csv", "column": "body"}
    mixture = ["c4", {"path": "b.json", "template": "{q} {a}", "weight": 2.0}]
    fields = {
        "model": "m",
        "calibration": {"data": mixture},
        "distill": {"data": source},
        "eval": {"perplexity": ["c4", {"path": "org/name", "split": "test[:9]"}]},
    }
    recipe = Recipe.model_validate(fields)
    again = Recipe.model_validate(recipe.to_dict())
    assert again == recipe and again.to_dict() == recipe.to_dict()
    assert recipe.to_dict()["calibration"]["data"] == [{"path": "c4", "weight": 1.0}, mixture[1]]
    assert recipe.to_dict()["distill"]["data"] == source
    assert str(recipe.distill_text.data) == "a.csv, column body"


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        ({"path": "a.csv", "colum": "x"}, ["calibration.data.colum: unknown key; did you mean 'column'?"]),
        ({"column": "x"}, ["calibration.data.path: required"]),
        ({"path": "a.csv", "weight": 2}, ["calibration.data.weight: unknown key"]),
        ([], ["calibration.data: must not be empty"]),
        ("", ["calibration.data: must not be empty"]),
        (["c4", 3], ["calibration.data[1]: must be a name or a path, or a mapping as {path: a.csv, column: body}"]),
        (
            ["", {"path": "a.csv", "weight": 0.0}],
            [
                "calibration.data[0].path: must not be empty",
                "calibration.data[1].weight: must be more than 0.0, not 0.0",
            ],
        ),
        (
            {"path": "a.csv", "column": "x", "template": "{x}"},
            ["calibration.data: column and template are two ways to make text of a row: choose one"],
        ),
        ({"path": "a.csv", "template": "x"}, ["calibration.data: template names no column"]),
        ({"path": "a.csv", "split": "train"}, ["calibration.data: config and split are of data sets on the hub"]),
        (7, ["calibration.data: must be a name or a path, or a mapping as {path: a.csv, column: body}"]),
    ],
)
def test_wrong_texts_have_their_place(data: object, problems: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"model: m\ncalibration: {{data: {json.dumps(data)}}}")
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "a.yaml", {})
    found = caught.value.message.splitlines()
    assert len(found) == len(problems)
    for line, expected in zip(found, problems, strict=True):
        assert line.startswith(f"{tmp_path / 'a.yaml'}:2:") and expected in line

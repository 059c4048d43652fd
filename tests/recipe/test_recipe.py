"""Recipes: precedence, errors with their places, assignment of layers, and the text round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.rtn import RTN
from qcli.algorithms.transforms.teq import TEQ
from qcli.models.families import Linear
from qcli.recipe.allocation import Allocation
from qcli.recipe.assign import assign
from qcli.recipe.errors import issues
from qcli.recipe.load import from_flags, load_recipe
from qcli.recipe.plugins import METHODS, build_method
from qcli.recipe.recipe import Recipe
from qcli.recipe.schema import recipe_schema
from qcli.recipe.sections import Pack
from qcli.recipe.yaml import dotted, read_yaml
from qcli.utils import registry
from qcli.utils.errors import UsageError

LAYERS = [
    Linear(f"model.layers.{block}.mlp.{name}", block, group, shape)
    for block in range(3)
    for group, (name, shape) in enumerate([("up_proj", (96, 64)), ("down_proj", (64, 96))])
]


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def problems(path: Path | None, flags: dict[str, object] | None = None, sets: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, flags or {}, sets)
    return caught.value.message.splitlines()


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
        assert line.startswith("allocation: unknown key; known: model, seed, ")
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
def test_a_recipe_is_what_it_writes(data: dict[str, Any]) -> None:
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


def test_contradictions_have_a_place(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\nrefine: {}\ncalibration: {samples: 4, held_out: 4}\ntransforms:\n")
    file = write(tmp_path, file.read_text() + "  - {name: teq}\n  - {name: teq, loss: kl}\n")
    assert problems(file) == [
        f"{file}:3:15: calibration.samples: training holds out 4 of 4 samples: none is left",
        f"{file}:6:5: transforms[1]: is trained on the whole model, which transforms block by block have not changed "
        "yet: name it before them",
    ]


def test_flag_wins_over_set_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\nmethod: {name: rtn, bits: 2, group_size: 32}\ncalibration: {samples: 7}\n")
    recipe = load_recipe(file, {"method.bits": 5, "out": None}, ["method.bits=3", "method.group_size=16"])
    assert recipe.method == RTN(bits=5, group_size=16)
    assert (recipe.calibration.samples, recipe.calibration.seq_len, recipe.out) == (7, 2048, None)
    assert recipe.origin(("method", "bits")) == "--bits"
    assert recipe.origin(("method", "group_size")) == "--set method.group_size=16"
    assert recipe.origin(("calibration", "samples")) == f"{file}:3:15"
    assert recipe.origin(("calibration", "seq_len")) == "default"


def test_flags_alone_are_enough() -> None:
    recipe = load_recipe(None, {"model": "m", "method.name": "rtn"})
    assert recipe == Recipe(model="m", method=RTN())
    assert load_recipe(None, {"model": "m"}).method == GPTQLike()


def test_unknown_key_has_place_and_nearest_name(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\n\nmethod: {name: rtn, bitz: 3}\n")
    assert problems(file) == [f"{file}:3:21: method.bitz: unknown key; did you mean 'bits'?"]


def test_all_errors_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: m\n"
        "sed: 1\n"
        "dtype: float23\n"
        "device: gpu\n"
        "model: n\n"
        "calibration: {samples: '16', seq_len: 1}\n"
        "method: {name: rtn, bits: true, damping: 0.1}\n"
        "overrides:\n"
        "  - {match: '*.x', method: {bits: 9}}\n"
        "  - {match: '*.y'}\n"
        "  - {match: '*.z', method: {name: gptq}}\n"
        "eval: {perplexity: []}\n",
    )
    assert sorted(problems(file, {"method.group_tail": "raged"}, ("pack.format=", "oops", "model.x=1"))) == sorted(
        [
            f"{file}:5:1: model: given twice; first on line 1",
            "--set oops: must be key=value, as in method.bits=3",
            "--set model.x=1: model has no 'x'",
            "--set pack.format=: must be text, not nothing",
            f"{file}:2:1: sed: unknown key; did you mean 'seed'?",
            (
                f"{file}:3:1: dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', not 'float23'; "
                "did you mean 'float32'?"
            ),
            f"{file}:4:1: device: must be written as 'auto' or 'cpu' or 'cuda:0', not 'gpu'",
            f"{file}:6:15: calibration.samples: must be a whole number, not '16'",
            f"{file}:6:30: calibration.seq_len: must be at least 2, not 1",
            f"{file}:7:21: method.bits: must be a whole number, not True",
            f"{file}:7:33: method.damping: unknown key; method 'rtn' has: {', '.join(RTN.model_fields)}",
            "--group-tail: must be 'error' or 'ragged', not 'raged'; did you mean 'ragged'?",
            f"{file}:9:29: overrides[0].method.bits: must be at most 8, not 9",
            f"{file}:10:5: overrides[1]: needs either `method: {{...}}` or `dense: true`",
            f"{file}:11:29: overrides[2].method.name: unknown method 'gptq'; did you mean 'gptq-like'?",
            f"{file}:12:8: eval.perplexity: must not be empty",
        ]
    )


def test_flag_that_the_method_lacks_is_named() -> None:
    (line,) = problems(None, {"model": "m", "method.name": "rtn", "method.ridge": 0.1})
    assert line.startswith("--ridge: unknown key; method 'rtn' has: ")


def test_gates_that_nothing_could_fail_are_refused() -> None:
    for gates, problem in (
        ("{max_task_drop: 0.1}", "gates.max_task_drop needs tasks"),
        ("{min_task: {piqa: 0.4}}", "gates.min_task names piqa, tasks does not"),
        ("{}", "names no gate"),
    ):
        (line,) = problems(None, {"model": "m"}, (f"eval.gates={gates}",))
        assert line.startswith(("eval", "--set eval.gates"))
        assert problem in line


def test_missing_model_has_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, {"method.name": "rtn"})
    assert caught.value.message == "model: required"
    assert caught.value.hint is not None
    assert "MODEL" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- 1", "1:1: a recipe is a mapping"),
        (b"", "1:1: a recipe is a mapping"),
        (b"\xff", "not UTF-8 text"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert words in problems(file)[0]


def test_missing_file(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == [f"recipe {tmp_path / 'none.yaml'}: No such file or directory"]


def test_sets_reach_into_lists_and_make_sections() -> None:
    recipe = load_recipe(
        None,
        {"model": "m"},
        [
            "overrides=[{match: '*.a', dense: true}]",
            "overrides.0.match='*.b'",
            "eval.perplexity=[c4]",
            "seed=3",
        ],
    )
    assert recipe.overrides[0].match == "*.b"
    assert recipe.eval is not None
    assert recipe.eval.perplexity == ["c4"]
    assert recipe.seed == 3
    assert recipe.origin(("overrides", 0, "match")) == "--set overrides.0.match='*.b'"
    assert recipe.origin(("overrides", 0, "dense")) == "--set overrides=[{match: '*.a', dense: true}]"
    assert problems(None, {"model": "m"}, ("overrides=[]", "overrides.0.match=x")) == [
        "--set overrides.0.match=x: overrides has no '0'"
    ]


def test_resolved_text_loads_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(
        None,
        {"model": "some/model", "out": "no", "method.name": "rtn", "method.bits": 3},
        [
            "overrides=[{match: '*.a', method: {name: gptq-like, damping: 1e-2}}, {match: 'b # [c]', dense: true}]",
            'calibration.data="1e-4"',
            "eval={}",
        ],
    )
    for text in (recipe.to_yaml(), recipe.to_yaml(origins=True)):
        again = load_recipe(write(tmp_path, text), {})
        assert again == recipe
        assert again.override_methods() == recipe.override_methods()
    shown = recipe.to_yaml(origins=True).splitlines()
    assert next(line for line in shown if line.lstrip().startswith("bits:")).endswith("# --bits")
    assert next(line for line in shown if line.lstrip().startswith("samples:")).endswith("# default")


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


def test_assign_takes_the_first_match() -> None:
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


def test_assign_tells_everything_that_does_not_fit(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: m\nmethod: {name: rtn, group_size: 64}\noverrides:\n"
        "  - {match: '*.q_proj', dense: true}\n"
        "  - {match: '*.0.*', dense: true}\n"
        "  - {match: '*.0.mlp.up_proj', method: {bits: 8}}\n",
    )
    recipe = load_recipe(file, {})
    with pytest.raises(UsageError) as caught:
        assign(recipe, LAYERS)
    assert caught.value.message.splitlines() == [
        f"{file}:4:6: overrides[0].match: '*.q_proj' matches no layer",
        f"{file}:6:6: overrides[2].match: '*.0.mlp.up_proj' matches only layers that earlier overrides take",
        f"{file}:2:1: method: group_size 64 does not divide its 96 inputs: model.layers.*.mlp.down_proj (2 layers)",
    ]
    assert caught.value.hint == "groups of 32 divide every row; group_tail ragged allows a shorter last group"


def test_assign_refuses_to_do_nothing() -> None:
    recipe = load_recipe(None, {"model": "m"}, ["overrides=[{match: '*', dense: true}]"])
    with pytest.raises(UsageError, match="nothing to quantize"):
        assign(recipe, LAYERS)


def test_fingerprint_ignores_what_does_not_change_the_bytes() -> None:
    flags = {"model": "m", "method.name": "rtn"}
    plain = load_recipe(None, flags)
    elsewhere = load_recipe(None, flags | {"out": "x", "device": "cpu", "resume": "never"}, ["eval={}", "pack={}"])
    other = load_recipe(None, flags | {"seed": 1})
    assert plain.fingerprint_fields() == elsewhere.fingerprint_fields()
    assert plain.fingerprint_fields() != other.fingerprint_fields()


def test_recipes_are_frozen() -> None:
    recipe = load_recipe(None, {"model": "m"})
    with pytest.raises(ValidationError):
        recipe.seed = 1


def test_sections_from_flags_alone() -> None:
    assert from_flags(Pack, {"shard_size": "2GB"}).shard_bytes == 2 * 10**9
    with pytest.raises(UsageError, match=r"^--shard-size: must be written as '500MB' or '5GB', not '5 gigs'$"):
        from_flags(Pack, {"shard_size": "5 gigs"})


def test_schema_names_every_option_of_every_method() -> None:
    schema = recipe_schema()
    names = registry.names(METHODS)
    assert schema["properties"]["method"]["oneOf"] == [{"$ref": f"#/$defs/{name}"} for name in names]
    for name in names:
        properties = schema["$defs"][name]["properties"]
        auto = {"target_bpw", "fused"} if name not in ("onebit", "dbllm") else set()
        assert set(properties) == {"name", *type(build_method({"name": name})).model_fields} | auto
        assert all("description" in field for field in properties.values())


@pytest.mark.parametrize("given", [{}, {"out": "elsewhere"}])
def test_the_record_of_a_result_names_the_folder_written_to(given: dict[str, str]) -> None:
    recipe = load_recipe(None, {"model": "m", **given})
    recorded = recipe.to_dict("runs/a")
    assert recorded == recipe.to_dict() | {"out": "runs/a"}
    assert list(recorded) == [name for name in type(recipe).model_fields if name in recorded]
    assert recipe.to_dict().get("out") == given.get("out")

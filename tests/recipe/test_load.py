"""Recipes from files, `--set` and flags: precedence, and errors with their places."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcli.algorithms.methods.gptq_like import GPTQLike
from qcli.algorithms.methods.rtn import RTN
from qcli.recipe.load import from_flags, load_recipe
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Pack
from qcli.utils.errors import UsageError


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def problems(path: Path | None, flags: dict[str, object] | None = None, sets: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, flags or {}, sets)
    return caught.value.message.splitlines()


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


@pytest.mark.parametrize(
    ("given", "meant"),
    [("bits", "method.bits"), ("target_bpw", "method.target_bpw"), ("samples", "calibration.samples")],
)
def test_a_key_of_a_section_given_outside_of_it(tmp_path: Path, given: str, meant: str) -> None:
    file = write(tmp_path, f"model: m\n{given}: 3\n")
    assert problems(file) == [f"{file}:2:1: {given}: unknown key; did you mean {meant!r}?"]
    (line,) = problems(None, {"model": "m"}, (f"{given}=3",))
    assert line == f"--set {given}=3: unknown key; did you mean {meant!r}?"
    (line,) = problems(None, {"model": "m"}, ("eval.max_kl=3",))
    assert line == "--set eval.max_kl=3: unknown key; did you mean 'eval.gates.max_kl'?"


def test_gates_that_cannot_fail_are_refused() -> None:
    for gates, problem in (
        ("{max_task_drop: 0.1}", "gates.max_task_drop needs tasks"),
        ("{min_task: {piqa: 0.4}}", "gates.min_task names piqa, tasks does not"),
        ("{}", "names no gate"),
    ):
        (line,) = problems(None, {"model": "m"}, (f"eval.gates={gates}",))
        assert line.startswith(("eval", "--set eval.gates"))
        assert problem in line


def test_contradictions_have_a_place(tmp_path: Path) -> None:
    file = write(tmp_path, "model: m\nrefine: {}\ncalibration: {samples: 4, held_out: 4}\ntransforms:\n")
    file = write(tmp_path, file.read_text() + "  - {name: teq}\n  - {name: teq, loss: kl}\n")
    assert problems(file) == [
        f"{file}:3:15: calibration.samples: training holds out 4 of 4 samples: none is left; use "
        "--set calibration.samples=5 or more, or --set calibration.held_out=3",
        f"{file}:6:5: transforms[1]: is trained on the whole model, which transforms block by block have not changed "
        "yet: name it before them",
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_the_samples_that_training_needs_are_named(number: int) -> None:
    (line,) = problems(None, {"model": "m", "method.name": "lcq", "calibration.samples": 4})
    assert line == (
        "--samples: training holds out 4 of 4 samples: none is left; use --samples 5 or more, or --set "
        "calibration.held_out=3"
    )
    remedy = ({"calibration.samples": 5}, ()), ({"calibration.samples": 4}, ("calibration.held_out=3",))
    flags, sets = remedy[number]
    assert load_recipe(None, {"model": "m", "method.name": "lcq", **flags}, sets).calibration.held_out < 5


def test_missing_model_has_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, {"method.name": "rtn"})
    assert caught.value.message == "MODEL: required"
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
def test_files_that_are_not_recipes(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert words in problems(file)[0]


def test_text_that_utf8_cannot_hold_is_refused_with_its_place(tmp_path: Path) -> None:
    file = write(tmp_path, 'model: "\\ud800"\n')
    assert f"{file}:1:8: model: contains half a character (a lone surrogate)" in problems(file)
    assert any("half a character" in line for line in problems(None, {}, ('model="\\udfff"',)))
    assert "--out: contains half a character (a lone surrogate): rename it in UTF-8" in problems(
        None, {"model": "m", "out": "caf\udce9"}
    )


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "vllm-w4.yaml").write_text("model: m")
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "vllm-w5.yaml", {})
    assert caught.value.hint == f"did you mean {tmp_path / 'vllm-w4.yaml'}?"


def test_key_inside_the_value_of_a_flag_is_named() -> None:
    assert problems(None, {"model": "m", "calibration.data": "{path: a.csv, colum: body}"}) == [
        "--data: colum: unknown key; did you mean 'column'?"
    ]
    assert problems(None, {"model": "m"}, ("method={bitz: 3}",)) == [
        "--set method={bitz: 3}: bitz: unknown key; did you mean 'bits'?"
    ]


def test_missing_file(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == [f"recipe {tmp_path / 'none.yaml'}: No such file or directory"]


def test_sets_reach_into_lists_and_create_sections() -> None:
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


def test_sections_from_flags_alone() -> None:
    assert from_flags(Pack, {"shard_size": "2GB"}).shard_bytes == 2 * 10**9
    with pytest.raises(UsageError, match=r"^--shard-size: must be written as '500MB' or '5GB', not '5 gigs'$"):
        from_flags(Pack, {"shard_size": "5 gigs"})

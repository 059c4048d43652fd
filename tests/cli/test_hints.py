"""What an error names is what was typed, and doing as its hint says helps."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Invoke, Outcome

RTN = ("--method", "rtn", "--group-size", "32")


def lines(outcome: Outcome, code: int) -> list[str]:
    """The lines of an error, after a check of the exit code."""
    assert (outcome.code, outcome.out) == (code, "")
    return outcome.err.splitlines()


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--bits", "3.5", "must be a whole number, not 3.5"),
        ("--bits", "four", "must be a whole number, not 'four'"),
        ("--group-size", "1e2", "must be a whole number, not 100.0"),
        ("--bits", "9", "must be at most 8, not 9"),
    ],
)
def test_numbers_are_refused_in_words(invoke: Invoke, flag: str, value: str, message: str) -> None:
    assert lines(invoke("quantize", "m", "--method", "rtn", flag, value), 2) == [f"error: {flag}: {message}"]


def test_distill_asks_for_its_teacher(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    error, hint = lines(invoke("distill", tmp_path, "--out", tmp_path / "x"), 2)
    assert (error, hint) == (
        "error: --teacher: required",
        "hint: give --teacher MODEL, or a --recipe FILE that sets `model:`",
    )
    student = tmp_path / "q"
    assert invoke("quantize", model, *RTN, "--out", student, "-q").code == 0
    assert invoke("distill", student, "--teacher", model, "--data", text, "--seq-len", "16", "--dry-run").code == 0


def test_quantize_asks_for_its_model(invoke: Invoke, tmp_path: Path) -> None:
    assert lines(invoke("quantize"), 2) == [
        "error: MODEL: required",
        "hint: give MODEL, or a --recipe FILE that sets `model:`",
    ]
    file = tmp_path / "r.yaml"
    file.write_text("seed: 1\n")
    assert lines(invoke("run", file), 2) == [
        f"error: {file}: model: required",
        "hint: the file names the model: `model: FOLDER`, or a hub id such as org/name",
    ]
    file.write_text("seed: 1\nmodel: org/name\n")
    assert invoke("recipe", "validate", file).code == 0


def test_group_sizes_are_refused_where_they_were_given(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    """By a flag, in the recipe's method or in an override; the hint is written in the same way, and helps."""
    *errors, hint = lines(invoke("quantize", model, "--method", "rtn", "--group-size", "48", "--dry-run"), 2)
    assert all(error.startswith("error: --group-size: groups of 48 do not divide its ") for error in errors)
    assert hint == "hint: --group-size 64 divides every row; --group-tail ragged allows a shorter last group"
    for advice in ("--group-size 64", "--group-size 48 --group-tail ragged"):
        assert invoke("quantize", model, "--method", "rtn", *advice.split(), "--dry-run").code == 0

    file = tmp_path / "r.yaml"
    recipe = "method: {{name: rtn, {}}}\noverrides:\n- {{match: '*.down_proj', method: {{{}}}}}\n"
    file.write_text(recipe.format("group_size: 64", "group_size: 48"))
    error, hint = lines(invoke("quantize", model, "--recipe", file, "--dry-run"), 2)
    assert error.startswith(f"error: {file}:3:35: overrides[0].method.group_size: groups of 48 do not divide ")
    first, second = hint.removeprefix("hint: ").split("; ")
    assert (first.split("`")[1], second.split("`")[1]) == ("group_size: 64", "group_tail: ragged")
    for advice in ("group_size: 64", "group_size: 48, group_tail: ragged"):
        file.write_text(recipe.format("group_size: 64", advice))
        assert invoke("quantize", model, "--recipe", file, "--dry-run").code == 0


def test_a_study_and_a_recipe_are_told_apart(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    study, recipe = tmp_path / "study.yaml", tmp_path / "recipe.yaml"
    study.write_text(f"base: {{model: {model}, method: {{name: rtn}}}}\ngrid: {{method.bits: [3, 4]}}\n")
    recipe.write_text(f"model: {model}\nmethod: {{name: rtn}}\nout: {tmp_path / 'out'}\n")
    for command in (("recipe", "validate", study), ("run", study), ("study", recipe)):
        error, hint = lines(invoke(*command), 2)
        assert error.endswith("is a study, not a recipe" if study in command else "is a recipe, not a study")
        advised = shlex.split(hint.split("`")[1])
        assert invoke(*advised[1:]).code == 0


def test_verify_says_what_is_not_there(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    assert lines(invoke("verify", tmp_path / "none"), 2) == [f"error: {tmp_path / 'none'} does not exist"]
    error, hint = lines(invoke("verify", model), 4)
    assert error == f"error: {model} is not a checkpoint that qcli wrote: it has no qcli.manifest.json"
    assert hint == "hint: `qcli quantize`, `distill` and `pack` write them"
    out = tmp_path / "q"
    assert invoke("quantize", model, *RTN, "--out", out, "-q").code == 0
    assert invoke("verify", out, "-q").code == 0


def test_errors_come_in_the_order_of_lines(invoke: Invoke, tmp_path: Path) -> None:
    """A method that is not known is no error of every override."""
    file = tmp_path / "r.yaml"
    file.write_text(
        "sed: 1\nmodel: m\nmodel: n\ncalibration: {samples: -1, data: 5}\nmethod: {name: rtnn}\n"
        "overrides:\n- {match: a, method: {bits: 3}}\n- {match: b, method: {bits: 99}}\nseeed: 5\n"
    )
    found = lines(invoke("quantize", "--recipe", file, "--seed", "-1"), 2)
    places = [error.removeprefix(f"error: {file}:").split(": ")[0] for error in found]
    assert places == ["1:1", "3:1", "4:15", "4:28", "5:10", "9:1", "error"]
    assert found[-1].startswith("error: --seed: ")


def edit(folder: Path, change: dict[str, torch.Tensor] | str) -> None:
    """Rename the tensors of a model by a prefix, or put others in the place of its first projection."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if isinstance(change, str):
        tensors = {change + name: tensor for name, tensor in tensors.items()}
    else:
        name = "model.layers.0.self_attn.q_proj"
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in change.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def test_checkpoints_of_other_software_are_called_quantized(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    edit(model, {"qweight": torch.zeros(8, 64, dtype=torch.int32), "scales": torch.ones(2, 64)})
    error, hint = lines(invoke("quantize", model, *RTN, "--out", tmp_path / "x"), 6)
    assert "is already quantized (model.layers.0.self_attn.q_proj.qweight), and its config.json does not say" in error
    assert "use the unquantized model" in hint


def test_packed_codes_of_mlx(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    edit(model, {"weight": torch.zeros(64, 8, dtype=torch.uint32)})
    error, hint = lines(invoke("quantize", model, *RTN, "--out", tmp_path / "x"), 2)
    assert error.endswith("has dtype U32, which qcli does not read")
    assert hint == "hint: use the unquantized model: MLX packs codes like this"


def test_a_prefix_of_all_names(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    edit(model, "_orig_mod.")
    error, hint = lines(invoke("quantize", model, *RTN, "--out", tmp_path / "x"), 2)
    assert "names its tensors _orig_mod.model.layers.0.self_attn.q_proj.weight, not " in error
    assert "'_orig_mod.'" in hint


def test_shards_without_their_index(invoke: Invoke, model: Path, tmp_path: Path) -> None:
    weights, index = model / "model.safetensors", model / "model.safetensors.index.json"
    shard = weights.rename(model / "model-00001-of-00001.safetensors")
    error, hint = lines(invoke("quantize", model, *RTN, "--out", tmp_path / "x"), 2)
    assert error.endswith(f"has parts of a model, such as {shard.name}, without {index.name}")
    assert hint.startswith(f"hint: copy {index.name} into it")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), shard.name)}))
    assert invoke("quantize", model, *RTN, "--out", tmp_path / "x", "-q").code == 0


def test_no_tokenizer(invoke: Invoke, model: Path, text: Path, tmp_path: Path) -> None:
    kept = {file.name: file.read_bytes() for file in model.glob("tokenizer*")}
    for name in kept:
        (model / name).unlink()
    command = ("quantize", model, "--group-size", "32", "--data", text, "--samples", "4", "--seq-len", "16", "--out")
    error, hint = lines(invoke(*command, tmp_path / "x"), 2)
    assert "has no usable tokenizer: " in error
    assert not error.endswith(":")
    assert "tokenizer.json and tokenizer_config.json" in hint
    for name, content in kept.items():
        (model / name).write_bytes(content)
    assert invoke(*command, tmp_path / "x", "-q").code == 0

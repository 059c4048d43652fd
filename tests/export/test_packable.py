"""A plan is refused by the same export targets as its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcli.export.pack import plan_pack
from qcli.export.packable import PlannedCheckpoint, require_packable, surely_packable
from qcli.export.target import Packable, load_target
from qcli.models.native import NativeSource
from qcli.models.open import open_source
from qcli.models.quantized import QuantizedSource
from qcli.quantization.plan import make_plan
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UnsupportedError
from qcli.utils.trust import NOTHING
from tests.quantizing import run, write_text
from tests.tiny import tiny_model, with_merge

TARGETS = ("qcli", "dense", "compressed-tensors", "gptq", "gguf")
RECIPES: dict[str, dict[str, Any]] = {
    "3 bits": {"method.name": "rtn", "method.bits": 3},
    "4 bits symmetric": {"method.name": "rtn", "method.bits": 4, "method.symmetric": True},
    "rows of 6 bits": {"method.name": "rtn", "method.bits": 6, "method.group_size": -1},
    "groups of 16": {"method.name": "rtn", "method.bits": 4, "method.group_size": 16},
    "ragged": {"method.name": "rtn", "method.bits": 4, "method.group_size": 48, "method.group_tail": "ragged"},
    "dense layers": {
        "method.name": "rtn",
        "method.bits": 4,
        "method.symmetric": True,
        "overrides": [{"match": "*.k_proj", "dense": True}],
    },
    "activations": {"method.name": "rtn", "method.bits": 8, "method.symmetric": True, "activations.bits": 8},
    "low rank": {"method.name": "gptq-like", "method.bits": 3, "low_rank.rank": 2},
    "float zero points": {"method.name": "gptq-like", "method.bits": 4, "method.zero_point": "float"},
    "codebook": {"method.name": "lcq", "method.bits": 2},
    "dual binary": {"method.name": "dbllm"},
    "sign": {"method.name": "onebit"},
    "sign as published": {"method.name": "onebit", "method.paper": True},
}


def refusal(source: Packable, target: str) -> str | None:
    try:
        load_target(target, None).check(source)
    except UnsupportedError as error:
        return error.message
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_plan_and_checkpoint_are_refused_alike(name: str, tmp_path: Path) -> None:
    model, text = with_merge(tiny_model("llama", tmp_path)), write_text(tmp_path)
    flags = {"model": str(model), "calibration.data": str(text), **RECIPES[name]}
    grouped = "method.group_size" not in flags and "sign" not in name
    flags |= {"method.group_size": 32} if grouped else {}
    recipe = load_recipe(None, flags | {"calibration.samples": 6, "calibration.seq_len": 32})
    planned = make_plan(recipe)
    expected = {target: refusal(PlannedCheckpoint(planned, tmp_path / "out"), target) for target in TARGETS}
    run(model, tmp_path / "out", text, grouped=grouped, **{k.replace(".", "__"): v for k, v in RECIPES[name].items()})
    checkpoint = open_source(str(tmp_path / "out"))
    assert isinstance(checkpoint, NativeSource)
    assert {target: refusal(checkpoint, target) for target in TARGETS} == expected
    assert expected["qcli"] is None
    assert any(expected.values()) or name == "4 bits symmetric"


def test_layers_to_requantize_are_not_refused(tmp_path: Path) -> None:
    model = with_merge(tiny_model("llama", tmp_path))
    recipe = load_recipe(None, {"model": str(model), "method.name": "onebit"})
    planned = make_plan(recipe)
    with pytest.raises(UnsupportedError, match="fits none of gguf's types"):
        require_packable(planned, tmp_path / "out", "gguf", None)
    require_packable(planned, tmp_path / "out", "gguf", "Q8_0")


def test_a_tokenizer_that_llama_cpp_does_not_load_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"model": str(tiny_model("llama", tmp_path)), "method.name": "rtn"})
    with pytest.raises(UnsupportedError, match="has no merges"):
        require_packable(make_plan(recipe), tmp_path / "out", "gguf", None)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("rtn", {"bits": 4, "symmetric": True}, "compressed-tensors"),
        ("rtn", {"bits": 3}, "gguf"),
        ("rtn", {"bits": 6}, "gguf"),  # Q8_0, whatever the zero points
        ("rtn", {"bits": 3, "zero_point": "float"}, None),
        ("fp8", {}, "compressed-tensors"),
        ("nvfp4", {}, None),  # whose divisors have to be shared
        ("onebit", {"paper": True}, None),
    ],
)
def test_what_surely_packs_is_known_without_a_weight(
    name: str, fields: dict[str, Any], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = with_merge(tiny_model("llama", tmp_path)), tmp_path / "out"
    run(model, out, grouped=name == "rtn", method__name=name, **{f"method__{key}": fields[key] for key in fields})
    with monkeypatch.context() as unread:
        unread.setattr(QuantizedSource, "read_quantized", lambda *_: pytest.fail("a weight was read"))
        assert surely_packable(out, ("compressed-tensors", "gguf", "gptq"), NOTHING) == expected
    if expected is not None:
        plan_pack(out, format=expected)

"""Study files: what they expand to, and the errors of invalid ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcli.quantization.plan import make_plan
from qcli.study.grid import Study, load_study
from qcli.utils.errors import UsageError
from tests.tiny import tiny_model

STUDY = """
base:
  model: some/model
  calibration: {samples: 16, seq_len: 128}
  method: {group_size: 32}
grid:
  method.name: [rtn, gptq-like]
  method.bits: [2, 3]
  refine: [null, {scope: block, steps: 5}]
include:
  - {method: {name: onebit}}
  - {method.name: rtn, method.bits: 3}
exclude:
  - {method.name: rtn, method.bits: [2, 8]}
"""


def study(tmp_path: Path, text: str) -> Study:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    return load_study(file)


def test_grids_expand_to_recipes(tmp_path: Path) -> None:
    expanded = study(tmp_path, STUDY)
    assert expanded.axes == ["method.name", "method.bits", "refine", "method"]
    settings = [
        (run.recipe.method.name, run.recipe.method.format.bits, run.recipe.refine and run.recipe.refine.steps)
        for run in expanded.runs
    ]
    assert settings == [
        ("rtn", 3, None),
        ("rtn", 3, 5),
        *((("gptq-like", bits, steps)) for bits in (2, 3) for steps in (None, 5)),
        ("onebit", 1, None),
    ], "a run that is named twice is one run"
    assert all(run.recipe.calibration.samples == 16 for run in expanded.runs)
    assert expanded.runs[0].point == {"method.name": "rtn", "method.bits": 3, "refine": None}
    assert len({run.address for run in expanded.runs}) == len(expanded.runs)


NAMED = """
base: {model: m, method: {group_size: 32}}
names:
  method: {PLAIN: {name: rtn}, OURS: {name: gptq-like, ridge: 0.1}}
  refine: {ZQ-Global: {steps: 5}}
grid:
  - {method: [PLAIN, OURS], method.bits: [2, 3], refine: [null, ZQ-Global]}
  - {method: [PLAIN], method.bits: [8]}
include: [{method: OURS, method.bits: 5}]
exclude: [{method: OURS, refine: ZQ-Global}]
"""


def test_values_have_names_and_grids_may_be_several(tmp_path: Path) -> None:
    runs = study(tmp_path, NAMED).runs
    settings = [(run.point, run.recipe.method.name, run.recipe.method.format.bits) for run in runs]
    assert settings == [
        *(
            ({"method": "PLAIN", "method.bits": bits, "refine": refine}, "rtn", bits)
            for bits in (2, 3)
            for refine in (None, "ZQ-Global")
        ),
        *(({"method": "OURS", "method.bits": bits, "refine": None}, "gptq-like", bits) for bits in (2, 3)),
        ({"method": "PLAIN", "method.bits": 8}, "rtn", 8),
        ({"method": "OURS", "method.bits": 5}, "gptq-like", 5),
    ]
    assert [run.recipe.refine and run.recipe.refine.steps for run in runs[:2]] == [None, 5]


def test_sets_change_the_base_and_axes_win(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("base: {model: m}\ngrid: {method.bits: [2]}")
    (run,) = load_study(file, ["model=other", "method.bits=8"]).runs
    assert (run.recipe.model, run.recipe.method.format.bits) == ("other", 2)
    with pytest.raises(UsageError, match="--set modle=x: .*did you mean 'model'"):
        load_study(file, ["modle=x"])


def test_far_too_many_combinations_fail_before_they_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("base: {model: m}\ngrid: {method.bits: [2, 3, 4], seed: [1, 2, 3, 4]}\ninclude: [{seed: 5}]")
    assert len(load_study(file, (), 2).runs) == 13, "few enough to expand"
    monkeypatch.setattr("qcli.study.grid.checked", None)
    with pytest.raises(UsageError, match=r"study\.yaml has up to 13 combinations") as caught:
        load_study(file, (), 1)
    assert caught.value.hint == "--yes allows more than 1"


def test_addresses_depend_on_what_determines_a_row(tmp_path: Path) -> None:
    first = study(tmp_path, "base: {model: a, eval: {perplexity: [x]}}")
    same = study(tmp_path, "base: {model: a, device: cpu, eval: {perplexity: [x]}}")
    other = study(tmp_path, "base: {model: a, eval: {perplexity: [y]}}")
    assert len(first.runs) == 1
    assert first.runs[0].address == same.runs[0].address != other.runs[0].address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("grids: {}", r"study\.yaml:1:1: grids: unknown key 'grids'; did you mean 'grid'\?"),
        ("base: []", r"study\.yaml:1:1: base: must be a mapping"),
        ("base: {model: m}\ngrid: {method.bits: 3}", r"study\.yaml:2:8: grid\.method\.bits: must be a list of values"),
        ("base: {model: m}\ngrid: [{method.bits: 3}]", r"study\.yaml:2:9: grid\.0\.method\.bits: must be a list"),
        ("base: {model: m}\nnames: {method: [3]}", r"names\.method: must be a mapping of names to values"),
        ("base: {model: m}\ngrid: {method.bitz: [3]}", r"study\.yaml:2:22: .*did you mean 'bits'"),
        ("base: {model: m}\ngrid: {method.bits: [3, 12]}", r"study\.yaml:2:25: .*bits"),
        ("base: {model: m, seed: x}", r"study\.yaml:1:18: seed"),
        ("base: {model: m}\nexclude: [{method.bits: 3}]", r"study\.yaml:2:11: matches no combination"),
        ("base: {model: m}\ninclude: [3]", r"include\.0: must be a mapping of axes"),
        ("grid: {method.bits: [3]}", "model: required"),
        (
            "base: {model: m}\ngrid: {pack.format: [gguf]}",
            r"study\.yaml:2:22: pack: pack, out and gates cannot",
        ),
        ("base: {model: m}\ninclude: [{out: a}]", r"study\.yaml:2:12: out: pack, out and gates cannot be part"),
        ("base: {model: m, pack: {format: gguf}}", r"study\.yaml:1:18: pack: pack, out and gates cannot be part"),
        ("base: {model: m, eval: {gates: {max_kl: 1}}}", r"study\.yaml:1:25: eval\.gates: pack, out and gates cannot"),
    ],
)
def test_errors_have_their_place(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=problem):
        study(tmp_path, text)


@pytest.mark.parametrize(
    "file", (Path(__file__).parents[2] / "recipes" / "studies").glob("*.yaml"), ids=lambda f: f.stem
)
def test_shipped_studies_fit_any_model(file: Path, tmp_path: Path) -> None:
    runs = load_study(file, [f"model={tiny_model('opt', tmp_path)}"]).runs
    assert 30 < len(runs) <= 100, "no --yes"
    quantized = [run for run in runs if run.recipe.method.name != "full-precision"]
    assert all(2 < make_plan(run.recipe).bits_per_weight < 10 for run in quantized)
    assert all(make_plan(run.recipe).bits_per_weight == 16 for run in runs if run not in quantized)

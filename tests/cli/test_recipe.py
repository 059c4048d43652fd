"""`qcli recipe`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Invoke


def test_validate_reports_every_error_of_every_file(invoke: Invoke, tmp_path: Path) -> None:
    good, bad, worse = (tmp_path / name for name in ("good.yaml", "bad.yaml", "worse.yaml"))
    good.write_text("model: m\n")
    bad.write_text("model: m\nmethod: {name: rtn, bitz: 3}\nsed: 1\n")
    worse.write_text("model: [m\n")
    assert invoke("recipe", "validate", good) == (0, f"{good}: valid\n", "")
    code, out, err = invoke("recipe", "validate", good, bad, worse)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"error: {bad}:2:21: method.bitz: unknown key; did you mean 'bits'?",
        f"error: {bad}:3:1: sed: unknown key; did you mean 'seed'?",
        f"error: {worse}:2:1: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ]


def test_show_prints_a_loadable_recipe_with_origins(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\nmethod: {name: rtn}\n")
    code, out, err = invoke("recipe", "show", file, "--set", "method.bits=3")
    assert (code, err) == (0, "")
    origins = {line.split(":")[0].strip(): line.partition("# ")[2] for line in out.splitlines()}
    assert origins["model"] == f"{file}:1:1"
    assert origins["bits"] == "--set method.bits=3"
    assert origins["group_size"] == "default"
    file.write_text(out)
    again = json.loads(invoke("recipe", "show", file, "--json").out)
    assert again["method"]["bits"] == 3


def test_schema_is_json(invoke: Invoke) -> None:
    code, out, _ = invoke("recipe", "schema")
    assert code == 0
    assert {"model", "method", "overrides"} <= json.loads(out)["properties"].keys()

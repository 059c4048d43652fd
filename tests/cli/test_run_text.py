"""`qcli run` of a recipe that names no text: all stages read the one that the first has chosen, also later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcli.data import datasets
from qcli.data.default_text import default_text
from qcli.utils import sealed
from qcli.utils.errors import UsageError
from tests.cli.conftest import Invoke


@pytest.fixture
def auto_recipe(model: Path, tmp_path: Path) -> Path:
    """All of whose texts are the default."""
    file = tmp_path / "auto.yaml"
    file.write_text(
        f"model: {json.dumps(str(model))}\n"
        "method: {name: gptq-like, bits: 3, group_size: 32}\n"
        "calibration: {samples: 2, seq_len: 32}\n"
        "eval: {window: 32, max_windows: 1}\n"
    )
    return file


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Choose whether a hub can be reached, as in a new process; the text of the hub is another one."""

    def online(reached: bool) -> None:
        default_text.cache_clear()
        monkeypatch.setattr("qcli.data.default_text._unreachable", lambda: None if reached else "no hub")
        read = (lambda *_, **__: "text of the hub " * 999) if reached else refuse
        monkeypatch.setattr("qcli.data.datasets._read_named", read)

    real = datasets._read_named

    def refuse(name: str, *, calibration: bool) -> str:
        if name == "wikitext2":
            raise UsageError("data set 'wikitext2' could not be loaded", hint="no hub")
        return real(name, calibration=calibration)

    yield online
    default_text.cache_clear()


def test_a_run_goes_on_with_the_default_text_that_it_began_with(
    invoke: Invoke, auto_recipe: Path, tmp_path: Path, reach: Callable[[bool], None]
) -> None:
    out = tmp_path / "out"
    reach(True)
    assert invoke("run", auto_recipe, "--out", out, "--set", "eval=null").code == 0
    reach(False)
    code, stdout, err = invoke("run", auto_recipe, "--out", out)
    assert (code, stdout) == (2, "") and "data set 'wikitext2' could not be loaded" in err
    assert not (out / "eval.json").exists()
    reach(True)
    assert invoke("run", auto_recipe, "--out", out).code == 0
    assert [*json.loads((out / "eval.json").read_text())["perplexity"]] == ["wikitext2"]
    reach(False)
    code, stdout, err = invoke("run", auto_recipe, "--out", out, "--json")
    assert code == 0 and "builtin" not in err and json.loads(stdout)["skipped"] == ["quantized", "eval.json"]


@pytest.mark.parametrize("recorded", [True, False])
def test_the_default_text_is_that_of_the_results(
    invoke: Invoke, auto_recipe: Path, tmp_path: Path, reach: Callable[[bool], None], recorded: bool
) -> None:
    """Earlier versions did not record it: the model knows what it was calibrated on."""
    out = tmp_path / "out"
    reach(False)
    code, _, err = invoke("run", auto_recipe, "--out", out, "--set", "eval=null")
    assert code == 0 and "--set calibration.data=TEXT names another" in err and err.count("names another") == 1
    [stages, hashes, text] = sealed.load_json(out / "stages.json")
    assert text == "builtin"
    if not recorded:
        sealed.write_json(out / "stages.json", [stages, hashes])
    reach(True)
    code, _, err = invoke("run", auto_recipe, "--out", out)
    assert code == 0, err
    assert [*json.loads((out / "eval.json").read_text())["perplexity"]] == ["builtin"]
    [stages, hashes, text] = sealed.load_json(out / "stages.json")
    assert text == "builtin"

    evaluation = (out / "eval.json").read_bytes().replace(b'"builtin"', b'"wikitext2"')
    (out / "eval.json").write_bytes(evaluation)
    sealed.write_json(out / "stages.json", [stages, {"eval.json": hashlib.sha256(evaluation).hexdigest()}])
    code, _, err = invoke("run", auto_recipe, "--out", out)
    assert code == 3 and "was made with wikitext2, another with builtin" in err

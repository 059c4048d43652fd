"""No code of a model runs unless the command line says so: no call of transformers is left to its default."""

from __future__ import annotations

import ast
import builtins
import json
from pathlib import Path
from typing import Any

import pytest

import qcli
from qcli.models.open import open_source
from qcli.recipe.recipe import Recipe
from qcli.utils.errors import UsageError
from qcli.utils.trust import Trust
from tests.models.test_gguf import write_gguf
from tests.tiny import tiny_model

BUILDERS = {"from_pretrained", "from_config", "from_hub", "for_model", "get_class_from_dynamic_module", "pipeline"}


def calls() -> list[tuple[str, ast.Call]]:
    """Every call of the package that may have transformers build something, with its place."""
    root = Path(qcli.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                if name in BUILDERS:
                    found.append((f"{file.relative_to(root).as_posix()}:{node.lineno}", node))
    return found


def test_one_function_builds_everything_and_says_whether_code_is_trusted() -> None:
    builders = calls()
    assert len(builders) == 2
    assert {place.partition(":")[0] for place, _ in builders} == {"models/pretrained.py"}
    for place, call in builders:
        assert "trust_remote_code" in {keyword.arg for keyword in call.keywords}, place


def test_no_recipe_can_trust_code() -> None:
    schema = json.dumps(Recipe.model_json_schema())
    assert "trust" not in schema and "remote" not in schema


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model that names code, and the file that this code would write; whoever is asked agrees."""
    folder, proof = tiny_model("llama", tmp_path), tmp_path / "it ran"
    arm(folder, proof)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return folder, proof


def arm(folder: Path, proof: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(proof)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'evil'\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.C"})
    edit(folder / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "evil.T"]})


def edit(file: Path, **fields: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | fields))


def test_code_of_a_tokenizer_runs_only_where_it_is_trusted(evil: tuple[Path, Path]) -> None:
    folder, proof = evil
    with pytest.raises(UsageError, match="needs Python code of its own") as refused:
        open_source(str(folder)).tokenizer()
    assert refused.value.hint is not None and "--trust-remote-code" in refused.value.hint
    assert not proof.exists()
    assert open_source(str(folder), Trust(remote_code=True)).tokenizer()("a").input_ids
    assert proof.exists()


def test_code_of_a_config_does_not_run_where_transformers_knows_the_model(evil: tuple[Path, Path]) -> None:
    folder, proof = evil
    assert type(open_source(str(folder)).hf_config()).__name__ == "LlamaConfig"
    assert not proof.exists()


def test_a_config_beside_a_gguf_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, proof = write_gguf(tmp_path), tmp_path / "it ran"
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    arm(tmp_path, proof)
    edit(tmp_path / "config.json", model_type="evil")
    with pytest.raises(UsageError, match=r"beside it lies another: tokenizer_config\.json"):
        open_source(str(file))
    (tmp_path / "tokenizer_config.json").unlink()
    open_source(str(file)).hf_config()
    open_source(str(file)).tokenizer()
    assert not proof.exists()

"""The documentation holds: links, paths, commands, recipes and supported models are what the code has."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from ruamel.yaml import YAML
from typer.core import TyperGroup

from qcli.cli.main import app
from qcli.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/README.md"]
PLACES = re.compile(r"`((?:qcli|tests|recipes|benchmarks|docs|examples)/[\w./*-]*)`")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_paths_exist(page: Path) -> None:
    missing = [path for path in PLACES.findall(page.read_text()) if not [*ROOT.glob(path.rstrip("/"))]]
    assert not missing


def commands() -> Iterator[tuple[str, str]]:
    """Every call of qcli in the pages' console blocks, with its page."""
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("$ qcli "):
                    yield page.name, line.removeprefix("$ qcli ")


@pytest.mark.parametrize(("page", "line"), [*commands()])
def test_commands_and_their_flags_exist(page: str, line: str) -> None:
    """Parsed, not run."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)
    while isinstance(command, TyperGroup):
        _, command, words = command.resolve_command(typer.Context(command), words)
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known


def recipes() -> list[str]:
    """Every YAML block that is a recipe of its own."""
    examples = [block for page in PAGES for block in blocks(page, "yaml")]
    return [block for block in examples if "model" in (YAML(typ="safe").load(block) or {})]


def test_recipes_are_valid(tmp_path: Path) -> None:
    assert len(recipes()) >= 2
    for number, text in enumerate(recipes()):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        load_recipe(file, {})


def test_the_recipe_reference_is_that_of_the_code() -> None:
    script = ROOT / "docs" / "reference.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == (ROOT / "docs" / "recipes.md").read_text(), "make reference"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_makefile_of_the_docs_runs_once(tmp_path: Path) -> None:
    """And again only after an edit of the recipe, also if that alone, without a new result, makes the gates pass."""
    (makefile,) = blocks(ROOT / "docs" / "ci.md", "make")
    (tmp_path / "Makefile").write_text(makefile)
    (tmp_path / "recipes").mkdir()
    recipe, calls = tmp_path / "recipes" / "3bit.yaml", tmp_path / "calls"
    recipe.write_text("model: m\n")
    program = tmp_path / "bin" / "qcli"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" >> calls\nmkdir -p 3bit/quantized\nexit "${GATE:-0}"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"

    def make(gate: int = 0) -> tuple[bool, int]:
        """Whether it succeeded, and how often qcli was called so far."""
        environment = os.environ | {"PATH": path, "GATE": str(gate)}
        run = subprocess.run(["make", "3bit.passed"], cwd=tmp_path, env=environment, capture_output=True)
        return run.returncode == 0, len(calls.read_text().splitlines())

    assert make(gate=4) == (False, 1)
    assert make() == (True, 2)
    assert make() == (True, 2)
    past = recipe.stat().st_mtime - 100
    for made in (tmp_path / "3bit.passed", tmp_path / "3bit" / "quantized"):
        os.utime(made, (past, past))  # older than the recipe, as after an edit
    assert make() == (True, 3)
    assert make() == (True, 3)


@each_page
def test_python_examples_are_those_of_the_files_they_name(page: Path) -> None:
    """A block that starts with `# path` is a part of that file."""
    for block in blocks(page, "python"):
        name, _, code = block.partition("\n")
        if name.startswith("# "):
            assert code in (ROOT / name.removeprefix("# ")).read_text(), name

"""The fast tier looks into every folder of tests."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def has_fast_tests(file: Path) -> bool:
    """Whether the marks in a file leave a test to `make test-fast`."""
    statements = ast.parse(file.read_text()).body
    if any(isinstance(node, ast.Assign) and "pytest.mark.slow" in ast.unparse(node) for node in statements):
        return False
    tests = [node for node in statements if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return any("pytest.mark.slow" not in map(ast.unparse, test.decorator_list) for test in tests)


def test_every_folder_has_fast_tests() -> None:
    folders = {file.parent for file in TESTS.rglob("test_*.py")}
    slow = {folder for folder in folders if not any(map(has_fast_tests, folder.glob("test_*.py")))}
    assert not slow

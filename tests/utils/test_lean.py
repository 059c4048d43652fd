"""Functions decorated without torch's compiler behave as decorated ones once it is there."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from qcli.utils import lean

COMPILER = "torch._dynamo"


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing imported it so far."""
    monkeypatch.delitem(sys.modules, COMPILER, raising=False)
    monkeypatch.delitem(sys.modules, f"{COMPILER}._trace_wrapped_higher_order_op", raising=False)


def doubled(x: int) -> int:
    return 2 * x


def tripled(x: int) -> int:
    return 3 * x


def compiler() -> ModuleType:
    """A compiler whose decorator `disable` adds 100 to what functions return."""
    module = ModuleType(COMPILER)
    module.__file__ = "dynamo.py"

    def disable(function: Callable[..., int], recursive: bool = True) -> Callable[..., int]:
        return lambda *args: function(*args) + (100 if recursive else 1000)

    module.disable = disable  # type: ignore[attr-defined]
    return module


def test_decorated_functions_run_without_the_compiler_and_are_decorated_once_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with lean.without_compiler():
        standin: Any = importlib.import_module(COMPILER)
        double, triple = standin.disable(doubled), standin.disable(recursive=False)(tripled)
        assert double(2) == 4
    assert COMPILER not in sys.modules
    assert (double(2), triple(2), double.__name__) == (4, 6, "doubled")
    monkeypatch.setitem(sys.modules, COMPILER, compiler())
    assert (double(2), triple(2)) == (104, 1006)


def test_whoever_needs_more_gets_the_real_module(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiler()
    real.optimize = "compiles"  # type: ignore[attr-defined]

    def load(name: str) -> ModuleType:
        assert name not in sys.modules  # else the import would find the stand-in
        monkeypatch.setitem(sys.modules, name, real)
        return real

    monkeypatch.setattr(lean, "import_module", load)
    with lean.without_compiler():
        standin: Any = importlib.import_module(COMPILER)
        assert standin.optimize == "compiles"
        assert sys.modules[COMPILER] is real
    assert sys.modules[COMPILER] is real


def test_an_imported_compiler_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiler()
    monkeypatch.setitem(sys.modules, COMPILER, real)
    with lean.without_compiler():
        assert sys.modules[COMPILER] is real


def test_processes_of_torchrun_import_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    lean.import_little()
    assert sys.meta_path == []
    monkeypatch.delenv("WORLD_SIZE")
    lean.import_little()
    assert len(sys.meta_path) == 1


@pytest.mark.slow
def test_whoever_imports_a_part_gets_the_real_package() -> None:
    code = "import torch, sys\nfrom qcli.utils.lean import without_compiler\nwith without_compiler():\n"
    code += "    import torch._dynamo.utils\n    assert sys.modules['torch._dynamo'].__file__\n"
    code += "assert torch._dynamo.utils.counters is sys.modules['torch._dynamo.utils'].counters\n"
    code += "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)) == 2"
    subprocess.run([sys.executable, "-c", code], check=True)

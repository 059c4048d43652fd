"""Register the transformers plug-in when transformers is imported: `import qcli` alone stays light.

The import hooks do not inherit from importlib.abc, whose import would cost every start of the command line 20 ms.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def when_imported(name: str, module: str, function: str) -> None:
    """Call `module.function()` right after module `name` is imported, now if it already is."""
    if name in sys.modules:
        getattr(import_module(module), function)()
    else:
        sys.meta_path.insert(0, _Finder(name, module, function))


class _Finder:
    """A meta-path finder of one module: finds it the usual way, once, and appends a call to its execution."""

    def __init__(self, name: str, module: str, function: str) -> None:
        self.name, self.module, self.function = name, module, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _CallingLoader(spec.loader, self.module, self.function))
        return spec


class _CallingLoader:
    """A loader that calls a function after it has executed its module."""

    def __init__(self, loader: Loader, module: str, function: str) -> None:
        self.loader, self.module, self.function = loader, module, function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        getattr(import_module(self.module), self.function)()

"""Import the transformers plug-in, which registers itself, when transformers is: `import qcli` alone stays light.

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


def when_imported(name: str, module: str) -> None:
    """Import `module` right after module `name` is imported, now if it already is."""
    if name in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Finder(name, module))


class _Finder:
    """A meta-path finder of one module: finds it the usual way, once, and lets another follow it."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _LeadingLoader(spec.loader, self.module))
        return spec


class _LeadingLoader:
    """A loader that imports another module after it has executed its own."""

    def __init__(self, loader: Loader, module: str) -> None:
        self.loader, self.module = loader, module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module(self.module)

"""Plug-ins by file name: `methods/gptq_like.py` is `gptq-like`. Listing the names imports none of them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qcli.utils.errors import UsageError


def names(package: str) -> list[str]:
    """Sorted names of the plug-ins in `package` (dotted): its modules whose names do not start with `_`."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    files = (file for root in spec.submodule_search_locations for file in Path(root).glob("*.py"))
    return sorted(file.stem.replace("_", "-") for file in files if not file.stem.startswith("_"))


def load(package: str, name: str) -> Any:
    """The class of plug-in `name`: the only name in its module's `__all__`.

    Raises:
        UsageError: no such plug-in; the hint lists the known ones.
    """
    known = names(package)
    if name not in known:
        kind = package.rpartition(".")[2].removesuffix("s")
        raise UsageError(f"unknown {kind} {name!r}", hint=f"known: {', '.join(known)}")
    module = import_module(f"{package}.{name.replace('-', '_')}")
    (exported,) = module.__all__
    return getattr(module, exported)

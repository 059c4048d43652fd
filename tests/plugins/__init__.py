"""A plug-in of every kind, as a user would write it: a format, a method that writes it, a layout that stores it, an
export target that writes the layout, and a data set. Nothing in `qcli` knows them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

PACKAGES = {
    "formats": "qcli.core.formats",
    "methods": "qcli.algorithms.methods",
    "layouts": "qcli.models.layouts",
    "targets": "qcli.export.targets",
    "sets": "qcli.data.sets",
}


def copy_plugins(folder: Path) -> None:
    """Copy the plug-ins to a folder outside of the package, a folder for each kind, with the text of the data set."""
    for kind in PACKAGES:
        shutil.copytree(Path(__file__).parent / kind, folder / kind, ignore=shutil.ignore_patterns("__pycache__"))
    lines = [f"{n} times {n + 1} is {n * (n + 1)}." for n in range(400)]
    (folder / "sets" / "products.txt").write_text("\n".join(lines))


def register(folder: Path) -> None:
    """Make Python look for further modules of qcli's packages in `folder`."""
    for kind, package in PACKAGES.items():
        import_module(package).__path__.append(str(folder / kind))


@contextmanager
def registered(folder: Path) -> Iterator[None]:
    """Within: the plug-ins, copied to `folder`, are registered."""
    before = set(sys.modules)
    copy_plugins(folder)
    register(folder)
    try:
        yield
    finally:
        for kind, package in PACKAGES.items():
            import_module(package).__path__.remove(str(folder / kind))
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                del sys.modules[name]

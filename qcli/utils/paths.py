"""Paths that users write, and what is left of them in files for others."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

# of texts and models: also the relative path of one is no hub id
_FILES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".gguf")


def expanded(text: str) -> str:
    """`~` and `~user` at the start of a path in full; anything else, hub ids and names of data sets too, as it is."""
    return os.path.expanduser(text)


def portable_name(text: str) -> str:
    """The last part of a path, which is all that says something elsewhere; hub ids and names of data sets as they are.

    A snapshot in a hub cache has the name of its model.
    """
    path = Path(expanded(text))
    elsewhere = path.is_absolute() or PureWindowsPath(text).is_absolute() or path.suffix.lower() in _FILES
    if not (elsewhere or text.startswith((".", "~")) or path.exists()):
        return text
    *_, repository, kind, name = ("", "", *PureWindowsPath(os.path.abspath(path)).parts)
    if kind == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return name

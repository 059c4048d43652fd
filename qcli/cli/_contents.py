"""The bytes of a model in words, and what would make them fewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcli.cli.ui.tables import size

_WORDS = {"linears": "linear layers", "embedding": "embedding", "head": "head", "other": "other"}


def contents_in_words(
    contents: Mapping[str, int] | None, before: Mapping[str, int] | None = None
) -> dict[str, str | None]:
    """A row: `linear layers 44.24 MB (was 66.11 MB), embedding and head 56.62 MB, other 215.31 kB`.

    Args:
        contents: bytes by kind; None: unknown.
        before: those of the model it was made from.
    """
    if contents is None:
        return {}
    parts = []
    for kind, count in contents.items():
        was = 0 if before is None else before[kind]
        what = "embedding and head" if kind == "embedding" and not contents["head"] else _WORDS[kind]
        if count or was:
            changed = f" (was {size(was)})" if before is not None and size(was) != size(count) else ""
            parts.append(f"{what} {size(count)}{changed}")
    return {"of which": ", ".join(parts)}


def smaller_in_words(smaller: Mapping[str, Any] | None) -> dict[str, str | None]:
    """A row that says how embedding and head, most of the bytes, would take fewer."""
    if smaller is None:
        return {}
    flags = " ".join(f"--set {setting}" for setting in smaller["set"])
    return {"smaller with": f"{flags}: about {size(smaller['bytes'])}"}

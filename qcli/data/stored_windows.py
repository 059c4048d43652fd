"""How many windows a folder of `qcli calibrate` has, from the header of its tokens. No torch."""

from __future__ import annotations

from pathlib import Path

from qcli.utils.errors import UsageError
from qcli.utils.safetensors import read_header

TOKENS = "tokens.safetensors"  # one tensor, `ids`


def stored_windows(folder: Path) -> tuple[int, int] | None:
    """Windows and tokens in each; None: the folder's tokens are missing or damaged."""
    try:
        windows, length = read_header(folder / TOKENS)["ids"].stored.shape
    except (UsageError, KeyError, ValueError):
        return None
    return windows, length

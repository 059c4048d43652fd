"""How `torchrun` started this process, if it did."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this process writes and prints; asked before any group of processes exists."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_here() -> int:
    """How many of them run on this machine, and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

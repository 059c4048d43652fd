"""Campaigns: endless streams of trials, by name.

A file of `campaigns/` defines generators and registers them:

    @campaign("name")
    def trials(random: Random, folder: Path) -> Iterator[Trial]:
        while True:
            yield Trial("what was tried, so that it can be tried again", problem=None)
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from typing import NamedTuple

from tests.faults import campaigns

EXIT_1, HANG, DAMAGE, OTHER = "exit 1", "hang", "silent damage", "other"
PROBLEMS = (EXIT_1, HANG, DAMAGE, OTHER)


class Trial(NamedTuple):
    """One input or fault.

    Attributes:
        what: it was, in words.
        problem: one of `PROBLEMS`; None: everything was as it should be.
        detail: what was seen.
    """

    what: str
    problem: str | None = None
    detail: str = ""


Campaign = Callable[[Random, Path], Iterator[Trial]]
_CAMPAIGNS: dict[str, Campaign] = {}


def campaign(name: str) -> Callable[[Campaign], Campaign]:
    """Register a generator of trials, which works in the folder that it is given."""

    def register(trials: Campaign) -> Campaign:
        assert name not in _CAMPAIGNS, name
        _CAMPAIGNS[name] = trials
        return trials

    return register


def all_campaigns() -> dict[str, Campaign]:
    """Those of every file in `campaigns/`."""
    for module in pkgutil.iter_modules(campaigns.__path__):
        import_module(f"{campaigns.__name__}.{module.name}")
    return dict(_CAMPAIGNS)

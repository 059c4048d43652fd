"""Whose code may run: that of installed packages always, any other only where the command line says so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trust:
    """Code that the user trusts. Only flags of the command line set these; a recipe has no such fields.

    Attributes:
        remote_code: Python files of models, which `auto_map` in a config or a tokenizer's config names.
        tasks: Jinja templates, `!function` references and metrics of task files that are not lm-eval's own.
    """

    remote_code: bool = False
    tasks: bool = False


NOTHING = Trust()

"""The record of a public data set: what a file of `sets/` exports. No torch, no `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NamedSet:
    """A data set: where it is, which parts are used, and how its rows become one text.

    Attributes:
        path: hub id, or name of a loader such as `text`, for `datasets.load_dataset`.
        load: its further arguments.
        column: the column with the text.
        separator: stands between two rows.
        calibration: the slice for calibration, in the notation of `datasets`.
        evaluation: the slice for evaluation.
    """

    path: str
    column: str
    separator: str
    calibration: str
    evaluation: str
    load: Mapping[str, Any] = field(default_factory=dict)

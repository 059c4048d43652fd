"""How a training went. Imports no torch: the manifest of a checkpoint records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Point: TypeAlias = tuple[int, float | None, float | None]
"""Steps, training loss, held-out loss."""


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        before: held-out loss of the initial weights.
        after: held-out loss of the weights that were kept: never above `before`.
        best_step: the step they are from; 0: no step improved on the initial weights.
        steps: number of steps made.
        stopped: why there were not more, if there should have been.
        curve: at the start and at every evaluation: steps made, mean training loss since the evaluation before
            (None at the start), held-out loss (None where it was not finite).
    """

    before: float
    after: float
    best_step: int
    steps: int
    stopped: str | None = None
    curve: tuple[Point, ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Outcome:
        """Inverse of `dataclasses.asdict`, after a round trip through JSON, which turns tuples into lists."""
        return cls(**{**fields, "curve": tuple((step, loss, held_out) for step, loss, held_out in fields["curve"])})

"""The outcome of a training. Imports no torch: the manifest of a checkpoint records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

CurvePoint: TypeAlias = tuple[int, float | None, float | None]
"""Steps made, training loss, held-out loss."""


@dataclass(frozen=True)
class Outcome:
    """Held-out losses of a training before and after, and its learning curve.

    Attributes:
        before: held-out loss of the initial weights.
        after: held-out loss of the best step, never above `before`.
        best_step: the step whose weights stay; 0: no step improved on the initial weights.
        steps: steps made.
        stopped: why there were fewer than scheduled, in words; None: there were not.
        curve: at the start and at every evaluation: steps made, mean training loss since the previous evaluation
            (None at the start), held-out loss (None where it was not finite).
    """

    before: float
    after: float
    best_step: int
    steps: int
    stopped: str | None = None
    curve: tuple[CurvePoint, ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Outcome:
        """Inverse of `dataclasses.asdict`, after a round trip through JSON, which turns tuples into lists."""
        return cls(**{**fields, "curve": tuple((step, loss, held_out) for step, loss, held_out in fields["curve"])})

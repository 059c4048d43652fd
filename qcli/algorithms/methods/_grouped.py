"""Options of every method whose format has groups of weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qcli.algorithms.methods._rows import RowScaledMethod


class GroupedMethod(RowScaledMethod):
    """A method whose format has table entries for each group of weights in a row."""

    bits: int = Field(default=4, ge=2, le=8, description="bits per weight's code")
    group_size: int = Field(default=64, ge=-1, description="weights of a row that share a scale; -1: the whole row")
    group_tail: Literal["error", "ragged"] = Field(
        default="error", description="if group_size does not divide a row: an error, or a shorter last group"
    )

    def unsupported_reason(self, shape: tuple[int, int]) -> str | None:
        if self.group_size == 0:
            return "must be positive, or -1 for whole rows"
        if self.group_tail == "error" and self.group_size > 0 and shape[1] % self.group_size:
            return f"groups of {self.group_size} do not divide its {shape[1]} inputs"
        return None

"""Options of the layers that are as large as the vocabulary: the head and the embedding."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from qcli.algorithms.method import Method
from qcli.recipe.plugins import build_method
from qcli.utils.options import Options


class VocabularyLayer(Options):
    """Options of an embedding: grids without zero points, so that a row can be decoded alone."""

    bits: Literal[8, 6, 4] = Field(default=8, description="bits per weight's code")
    group_size: int = Field(default=64, ge=-1, description="weights of a row that share a scale; -1: the whole row")

    @field_validator("group_size")
    @classmethod
    def _not_empty(cls, size: int) -> int:
        if size == 0:
            raise ValueError("must be positive, or -1 for whole rows")
        return size

    def as_method(self) -> Method:
        """The method that quantizes the layer."""
        return self._built("rtn")

    def _built(self, name: str, **options: bool) -> Method:
        grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": True, "row_exponents": False}
        return build_method({"name": name, **grid, **options})


class Head(VocabularyLayer):
    """Options of the head."""

    method: Literal["rtn", "gptq-like"] = Field(
        default="rtn",
        description="rounding to nearest, or error feedback under the Hessian of what the final norm gives on the "
        "calibration text",
    )

    def as_method(self) -> Method:
        """The method that quantizes the head: there is no later layer, so its target is its own weight."""
        return self._built("rtn") if self.method == "rtn" else self._built("gptq-like", refit_target=False)

"""`method: {bits: auto, target_bpw: 3.2}`: what a recipe says where the width of each layer is left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qcli.recipe.errors import Issue

AUTO = "auto"
OWN = ("target_bpw", "fused")  # fields that only an automatic method has


class Allocation(BaseModel):
    """What `bits: auto` is told.

    Attributes:
        groups: whether the group size is chosen too.
        fused: whether layers that engines compute as one get one format, which they can load only then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_bpw: float = Field(gt=0, description="with bits auto: most bits per weight of the quantized layers")
    groups: bool = False
    fused: bool = Field(
        default=False,
        description="with bits auto: one width for layers that engines compute as one (q, k, v; gate, up)",
    )

    def fields(self) -> dict[str, Any]:
        """As they stand in a recipe's method."""
        said = {"bits": AUTO, "target_bpw": self.target_bpw} | ({"fused": True} if self.fused else {})
        return said | ({"group_size": AUTO} if self.groups else {})


def split(method: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None, list[Issue]]:
    """Tell the fields of an automatic method from those of the method itself.

    Returns:
        The method's own fields, those of its `Allocation` if it has one, and what is wrong between them.
    """
    rest, wanted = dict(method), None
    if rest.get("bits") == AUTO:
        wanted = {"groups": rest.get("group_size") == AUTO}
        wanted |= {name: rest.pop(name) for name in OWN if name in rest}
        del rest["bits"]
        if wanted["groups"]:
            del rest["group_size"]
        return rest, wanted, []
    found = []
    for name in (name for name in OWN if name in rest):
        del rest[name]
        found.append(Issue(("method", name), "is for bits: auto"))
    if rest.get("group_size") == AUTO:
        del rest["group_size"]
        found.append(Issue(("method", "group_size"), "auto goes with bits: auto"))
    return rest, wanted, found

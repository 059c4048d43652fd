"""`method: {bits: auto, target_bpw: 3.2}`: bits that are chosen layer by layer, within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from qcli.recipe.errors import Issue, invalid
from qcli.utils.options import Options

AUTO = "auto"
OWN = ("target_bpw", "fused")  # options of a method that are the allocation's and no method's


class Allocation(Options):
    """How bits are allocated to layers.

    Attributes:
        groups: whether group sizes are chosen too.
    """

    target_bpw: float = Field(
        gt=0, description="with bits: auto: upper bound on the bits per weight of the quantized layers, tables included"
    )
    groups: bool = False
    fused: bool = Field(
        default=False,
        description="with bits: auto: the same width for layers that engines fuse (q, k, v; gate, up)",
    )

    def options(self) -> dict[str, Any]:
        """The options of a recipe's method that say this."""
        options = {"bits": AUTO, "target_bpw": self.target_bpw} | ({"fused": True} if self.fused else {})
        return options | ({"group_size": AUTO} if self.groups else {})


def allocation_of(method: Any) -> Allocation | None:
    """The allocation that the options of a method say; None where they leave nothing open.

    Raises:
        ValidationError: options of an allocation that are invalid, or go without `bits: auto`.
    """
    if not isinstance(method, Mapping):
        return None
    own = {name: method[name] for name in OWN if name in method}
    groups = method.get("group_size") == AUTO
    if method.get("bits") == AUTO:
        return Allocation.model_validate(own | {"groups": groups})
    problems = [Issue((name,), "needs bits: auto") for name in own]
    problems += [Issue(("group_size",), "auto needs bits: auto")] if groups else []
    if problems:
        raise invalid("Allocation", problems)
    return None


def without_allocation(method: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are the method's own: neither left open nor the allocation's."""
    left_open = {name for name in ("bits", "group_size") if method.get(name) == AUTO}
    return {name: value for name, value in method.items() if name not in left_open and name not in OWN}

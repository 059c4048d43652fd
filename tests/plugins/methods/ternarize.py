"""Ternary weights with the scale that fits the layer's inputs best."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from qcli.algorithms.layer_group import HESSIAN, LinearGroup
from qcli.algorithms.method import Method, Solution
from qcli.utils import registry

__all__ = ["Ternarize"]


class Ternarize(Method):
    """Signs of all weights above a threshold, and a least-squares scale weighted by the energy of the inputs."""

    name: ClassVar[str] = "ternarize"

    threshold: float = Field(default=0.7, gt=0, description="of a row's mean magnitude, below which a weight becomes 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({HESSIAN})

    @property
    def format(self) -> Any:
        return registry.load("qcli.core.formats", "ternary")()

    def quantize(self, group: LinearGroup) -> dict[str, Solution]:
        from qcli.core.weight import QuantizedWeight

        assert group.hessian is not None
        energy, solutions = group.hessian.diagonal(), {}
        for name, weight in group.weights.items():
            kept = weight.abs() > self.threshold * weight.abs().mean(1, keepdim=True)
            signs = weight.sign() * kept
            scale = (energy * weight * signs).sum(1, keepdim=True) / (energy * signs.square()).sum(1, keepdim=True)
            tables = {"scale": scale.half()}
            codes = self.format.encode(signs * tables["scale"].float(), tables)
            solutions[name] = Solution(QuantizedWeight(self.format, (weight.shape[0], weight.shape[1]), codes, tables))
        return solutions

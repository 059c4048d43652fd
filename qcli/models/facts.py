"""Statistics that formats report of their weights (`Format.facts`): their means over a model, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcli.models.manifest import LayerReport


def mean_facts(layers: Iterable[LayerReport], shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """The mean of each statistic over the weights of all layers that have it.

    Args:
        shapes: `(out_features, in_features)`, by name of the layer.
    """
    totals: dict[str, float] = {}
    counts: dict[str, int] = {}
    for layer in layers:
        for name, value in layer.facts.items():
            n_weights = prod(shapes[layer.name])
            totals[name] = totals.get(name, 0.0) + value * n_weights
            counts[name] = counts.get(name, 0) + n_weights
    return {name: total / counts[name] for name, total in totals.items()}


def facts_in_words(facts: Mapping[str, float]) -> dict[str, str]:
    """`mean_facts` for people, by label."""
    if "additions_per_weight" not in facts:
        return {}
    planes = " and ".join(f"{facts[f'zeros_plane{plane}']:.1%} of plane {plane}" for plane in (1, 2))
    return {"additions per weight": f"{facts['additions_per_weight']:.3g}; zeros are {planes}"}

"""The search space of `bits: auto`: candidate widths for each layer, their sizes, and the recipe of an assignment.

A candidate is the recipe's method at one width and, with `group_size: auto`, one group size. No torch here: whether a
target can be reached follows from shapes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from qcli.algorithms.method import Method
from qcli.models.families import fused
from qcli.quantization.solve import stored_format
from qcli.recipe.allocation import Allocation
from qcli.recipe.errors import Issue
from qcli.recipe.plugins import build_method, named_options
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Override

if TYPE_CHECKING:
    from qcli.models.families import Linear

WIDTHS = range(1, 9)
GROUP_SIZES = (32, 64, 128)  # that `group_size: auto` chooses from
_BELOW, _ABOVE = 1.6, 2.1  # candidates this many bits per weight below and above the budget's average are measured

Assignment = Mapping[str, int]  # by layer name: the index of its candidate


@dataclass(frozen=True)
class SearchSpace:
    """Candidates for each layer, and the budget they share.

    Attributes:
        recipe: with an allocation.
        layers: those whose candidate is searched; overrides take the others.
        candidates: near the target; not every layer fits all of them.
        sizes: bits on disk, by layer name and candidate; None where the layer does not fit.
        fixed_size: bits on disk of the layers that overrides quantize.
        n_weights: weights of all quantized layers.
    """

    recipe: Recipe
    layers: list[Linear]
    candidates: list[Method]
    sizes: dict[str, list[int | None]]
    fixed_size: int
    n_weights: int

    @cached_property
    def budget(self) -> int:
        """Bits that the layers may take together."""
        return int(_allocation(self.recipe).target_bpw * self.n_weights) - self.fixed_size

    def bits_per_weight(self, assignment: Assignment) -> float:
        """Of all quantized layers, tables included."""
        size = sum(self.sizes[name][candidate] or 0 for name, candidate in assignment.items())
        return (self.fixed_size + size) / self.n_weights

    @cached_property
    def tied(self) -> list[list[str]]:
        """Names of the layers, grouped by those that must get one candidate."""
        groups = fused(self.layers) if _allocation(self.recipe).fused else [[layer] for layer in self.layers]
        return [[layer.name for layer in group] for group in groups]

    @property
    def choices(self) -> dict[str, Any]:
        """The target, the widths and group sizes that layers may get, and the names of the layers, as plain data."""
        options = [candidate.model_dump() for candidate in self.candidates]
        return {
            "target_bpw": _allocation(self.recipe).target_bpw,
            "bits": sorted({option["bits"] for option in options}),
            "group_sizes": sorted({size for option in options if (size := option.get("group_size")) is not None}),
            "layers": [layer.name for layer in self.layers],
        }

    def uniform(self) -> list[int]:
        """Candidates that all layers can have within the budget, the smallest first."""
        totals = {}
        for candidate in range(len(self.candidates)):
            sizes = [by_candidate[candidate] for by_candidate in self.sizes.values()]
            if None not in sizes and (total := sum(map(int, filter(None, sizes)))) <= self.budget:
                totals[candidate] = total
        return sorted(totals, key=lambda candidate: totals[candidate])

    def recipe_of(self, assignment: Assignment) -> Recipe:
        """The recipe that gives each layer its candidate: the commonest as its method, the others as overrides."""
        weights: Counter[int] = Counter()
        for layer in self.layers:
            weights[assignment[layer.name]] += prod(layer.shape)
        commonest = max(weights, key=lambda candidate: (weights[candidate], candidate))
        given = [
            rule if method is None else Override(match=rule.match, method=named_options(method))
            for rule, method in zip(self.recipe.overrides, self.recipe.override_methods(), strict=True)
        ]
        kinds: dict[str, list[Linear]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.replace(f".{layer.block}.", ".*.", 1), []).append(layer)
        of_layers, of_kinds = [], []
        for pattern, members in kinds.items():
            counts = Counter(assignment[layer.name] for layer in members)
            usual = max(counts, key=lambda candidate: (counts[candidate], candidate == commonest))
            of_layers += [
                self._override(layer.name, assignment[layer.name])
                for layer in members
                if assignment[layer.name] != usual
            ]
            if usual != commonest:
                of_kinds.append(self._override(pattern, usual))
        return self.recipe.model_copy(
            update={
                "method": self.candidates[commonest],
                "allocation": None,
                "overrides": [*given, *of_layers, *of_kinds],
            }
        )

    def _override(self, match: str, candidate: int) -> Override:
        """Only in what candidates differ."""
        options = named_options(self.candidates[candidate])
        return Override(match=match, method={name: options[name] for name in ("bits", "group_size") if name in options})


def search_space(recipe: Recipe, layers: Sequence[Linear]) -> SearchSpace:
    """The candidates of every layer that no override takes.

    Raises:
        UsageError: the method has no choice of bits, an override leaves its bits open, or the target is out of reach.
    """
    others = recipe.override_methods()
    problems = [
        Issue(("overrides", i, "method"), "must set bits: the recipe's are auto")
        for i, (rule, other) in enumerate(zip(recipe.overrides, others, strict=True))
        if other is not None and rule.method is not None and "bits" in named_options(other).keys() - rule.method.keys()
    ]
    candidates = _candidates(recipe)
    if len(candidates) < 2:
        problems.append(Issue(("method", "bits"), f"auto: {recipe.method.name} has only one width"))
    if problems:
        raise recipe.located(problems)
    overridden = {layer.name: others[i] for layer in layers for i in recipe.matching_overrides(layer.name)[:1]}
    free = [layer for layer in layers if layer.name not in overridden]
    fixed = [(layer, method) for layer in layers if (method := overridden.get(layer.name)) is not None]
    space = SearchSpace(
        recipe=recipe,
        layers=free,
        candidates=candidates,
        sizes={layer.name: [_size(recipe, candidate, layer) for candidate in candidates] for layer in free},
        fixed_size=sum(_size(recipe, method, layer) or 0 for layer, method in fixed),
        n_weights=sum(prod(layer.shape) for layer in [*free, *(layer for layer, _ in fixed)]),
    )
    _require_reachable(space)
    return _near_budget(space)


def uniform_recipe(space: SearchSpace) -> Recipe:
    """The recipe with the largest candidate that all layers can have within the budget, or the smallest of each."""
    if uniform := space.uniform():
        return space.recipe_of({layer.name: uniform[-1] for layer in space.layers})
    smallest = {
        name: min((size, candidate) for candidate, size in enumerate(sizes) if size is not None)[1]
        for name, sizes in space.sizes.items()
    }
    return space.recipe_of(smallest)


def mixed_recipe(recipe: Recipe, layers: Sequence[Linear]) -> Recipe:
    """A recipe that uses the candidates in turn: a layout that cannot hold it may not hold the allocation either.

    Raises:
        UsageError: as `search_space`.
    """
    space = search_space(recipe, layers)
    assignment: dict[str, int] = {}
    for number, names in enumerate(space.tied):
        fitting = [candidate for candidate, size in enumerate(space.sizes[names[0]]) if size is not None]
        assignment |= dict.fromkeys(names, fitting[number % len(fitting)])
    return space.recipe_of(assignment)


def _candidates(recipe: Recipe) -> list[Method]:
    """The recipe's method in every width that it has and, if that is left open, with every group size."""
    base, candidates = named_options(recipe.method), []
    sizes: list[dict[str, Any]] = [{}]
    if _allocation(recipe).groups:
        sizes = [{"group_size": size} for size in GROUP_SIZES]
    for bits in WIDTHS:
        for size in sizes:
            try:
                candidates.append(build_method({**base, "bits": bits, **size}))
            except ValidationError:  # a width or an option that the method does not have
                continue
    return candidates


def _size(recipe: Recipe, method: Method, layer: Linear) -> int | None:
    """Bits on disk; None where the layer does not fit."""
    if _misfit(recipe, method, layer):
        return None
    stored = stored_format(method, recipe.low_rank).stored(layer.shape)
    return 8 * sum(tensor.bytes for tensor in stored.values())


def _misfit(recipe: Recipe, method: Method, layer: Linear) -> str | None:
    return method.unsupported_reason(layer.shape) or (
        recipe.low_rank.unsupported_reason(layer.shape) if recipe.low_rank else None
    )


def _require_reachable(space: SearchSpace) -> None:
    fitting = {name: [size for size in sizes if size is not None] for name, sizes in space.sizes.items()}
    if not fitting:
        raise space.recipe.located([Issue(("method", "bits"), "auto: overrides take every layer")])
    for layer in space.layers:
        if not fitting[layer.name]:
            reason = _misfit(space.recipe, space.candidates[0], layer)
            raise space.recipe.located([Issue(("method",), f"{reason}: {layer.name}")])
    low, high = ((space.fixed_size + sum(map(end, fitting.values()))) / space.n_weights for end in (min, max))
    if not low <= _allocation(space.recipe).target_bpw < high:
        message = f"must be within {low:.4g} and {high:.4g}, the range of {space.recipe.method.name} on this model"
        raise space.recipe.located([Issue(("method", "target_bpw"), message)])


def _near_budget(space: SearchSpace) -> SearchSpace:
    """Only candidates that some layer might get: each is measured on every layer."""
    n_weights = {layer.name: prod(layer.shape) for layer in space.layers}
    average = space.budget / sum(n_weights.values())

    def bits_per_weight(candidate: int) -> float:
        fitting = [(size, n_weights[name]) for name, sizes in space.sizes.items() if (size := sizes[candidate])]
        return sum(size for size, _ in fitting) / sum(n for _, n in fitting) if fitting else float("inf")

    near = [
        candidate
        for candidate in range(len(space.candidates))
        if average - _BELOW <= bits_per_weight(candidate) <= average + _ABOVE
    ]
    return SearchSpace(
        recipe=space.recipe,
        layers=space.layers,
        candidates=[space.candidates[candidate] for candidate in near],
        sizes={name: [sizes[candidate] for candidate in near] for name, sizes in space.sizes.items()},
        fixed_size=space.fixed_size,
        n_weights=space.n_weights,
    )


def _allocation(recipe: Recipe) -> Allocation:
    assert recipe.allocation is not None
    return recipe.allocation

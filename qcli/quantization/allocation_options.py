"""`method: {bits: auto, target_bpw: 3.2}`: which options each layer has, and the recipe that a choice comes to.

No torch here: what is reachable is told from headers alone.
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
from qcli.recipe.errors import Issue
from qcli.recipe.plugins import build_method, named_options
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Override

if TYPE_CHECKING:
    from qcli.models.families import Linear

GROUP_SIZES = (32, 64, 128)  # that `group_size: auto` chooses from
_BELOW, _ABOVE = 1.6, 2.1  # bits around the target from which options are measured


@dataclass(frozen=True)
class Choices:
    """What there is to choose from.

    Attributes:
        recipe: the automatic one.
        layers: those that no override takes.
        options: near the target; a layer may have fewer.
        stored: bits on disk by layer and option; None: the option does not fit the layer.
        fixed: bits on disk of layers that overrides quantize.
        weights: of all quantized layers.
    """

    recipe: Recipe
    layers: list[Linear]
    options: list[Method]
    stored: dict[str, list[int | None]]
    fixed: int
    weights: int

    @cached_property
    def budget(self) -> int:
        """Bits that the layers may take together."""
        return int(_target(self.recipe) * self.weights) - self.fixed

    def bits_per_weight(self, chosen: Mapping[str, int]) -> float:
        """Of all quantized layers, tables included, with these options."""
        return (self.fixed + sum(self.stored[name][option] or 0 for name, option in chosen.items())) / self.weights

    @cached_property
    def units(self) -> list[list[str]]:
        """Names of the layers that get one option together."""
        together = self.recipe.allocation is not None and self.recipe.allocation.fused
        units = fused(self.layers) if together else [[layer] for layer in self.layers]
        return [[layer.name for layer in layers] for layers in units]

    def uniform(self) -> list[int]:
        """Options that every layer can have and that keep within the target, the smallest first."""
        sizes = {}
        for option in range(len(self.options)):
            bits = [stored[option] for stored in self.stored.values()]
            if None not in bits and (size := sum(map(int, filter(None, bits)))) <= self.budget:
                sizes[option] = size
        return sorted(sizes, key=lambda option: sizes[option])

    def resolved(self, chosen: Mapping[str, int]) -> Recipe:
        """The recipe that says for every layer what has been chosen for it."""
        weight: Counter[int] = Counter()
        for layer in self.layers:
            weight[chosen[layer.name]] += prod(layer.shape)
        usual = max(weight, key=lambda option: (weight[option], option))
        base = self.options[usual]
        overrides = [
            rule if method is None else Override(match=rule.match, method=named_options(method))
            for rule, method in zip(self.recipe.overrides, self.recipe.override_methods(), strict=True)
        ]
        kinds: dict[str, list[Linear]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.name.replace(f".{layer.block}.", ".*.", 1), []).append(layer)
        single, whole = [], []
        for pattern, members in kinds.items():
            counts = Counter(chosen[layer.name] for layer in members)
            most = max(counts, key=lambda option: (counts[option], option == usual))
            exceptions = [layer for layer in members if chosen[layer.name] != most]
            single += [Override(match=layer.name, method=self._differs(chosen[layer.name])) for layer in exceptions]
            if most != usual:
                whole.append(Override(match=pattern, method=self._differs(most)))
        return self.recipe.model_copy(
            update={"method": base, "allocation": None, "overrides": [*overrides, *single, *whole]}
        )

    def _differs(self, option: int) -> dict[str, Any]:
        """What an override must say."""
        fields = named_options(self.options[option])
        return {name: fields[name] for name in ("bits", "group_size") if name in fields}


def choices(recipe: Recipe, layers: Sequence[Linear]) -> Choices:
    """The options of every layer.

    Raises:
        UsageError: the method has no choice of bits, an override leaves its bits open, or the target is out of reach.
    """
    problems = [
        Issue(("overrides", i, "method"), "must say its bits: the recipe's are auto")
        for i, (rule, other) in enumerate(zip(recipe.overrides, recipe.override_methods(), strict=True))
        if rule.method is not None
        and "bits" not in rule.method
        and other is not None
        and "bits" in named_options(other)
    ]
    options = _options(recipe)
    if len(options) < 2:
        problems.append(Issue(("method", "bits"), f"auto: {recipe.method.name} has no choice of bits"))
    if problems:
        raise recipe.located(problems)
    rules, others = recipe.overrides, recipe.override_methods()
    taken = {layer.name: others[i] for layer in layers for i in recipe.rules(layer.name)[:1]} if rules else {}
    free = [layer for layer in layers if layer.name not in taken]
    fixed = [(layer, method) for layer in layers if (method := taken.get(layer.name)) is not None]
    stored = {layer.name: [_stored(recipe, option, layer) for option in options] for layer in free}
    weights = sum(prod(layer.shape) for layer in [*free, *(layer for layer, _ in fixed)])
    found = Choices(
        recipe, free, options, stored, sum(_stored(recipe, method, layer) or 0 for layer, method in fixed), weights
    )
    _require_reachable(found)
    return _near_the_target(found)


def uniform(recipe: Recipe, layers: Sequence[Linear]) -> Recipe:
    """The recipe with the most bits for all layers alike that keep within the target; or the fewest for each.

    Raises:
        UsageError: as `choices`.
    """
    found = choices(recipe, layers)
    alike = found.uniform()
    if alike:
        return found.resolved({layer.name: alike[-1] for layer in found.layers})
    smallest = {
        name: min((bits, option) for option, bits in enumerate(stored) if bits is not None)[1]
        for name, stored in found.stored.items()
    }
    return found.resolved(smallest)


def mixed(recipe: Recipe, layers: Sequence[Linear]) -> Recipe:
    """A recipe with the options by turns: what a layout cannot hold of it may be chosen. `pack` has the last word.

    Raises:
        UsageError: as `choices`.
    """
    found = choices(recipe, layers)
    chosen: dict[str, int] = {}
    for number, unit in enumerate(found.units):
        fitting = [option for option, bits in enumerate(found.stored[unit[0]]) if bits is not None]
        chosen |= dict.fromkeys(unit, fitting[number % len(fitting)])
    return found.resolved(chosen)


def _options(recipe: Recipe) -> list[Method]:
    """The recipe's method in every width, and if that is left open with every group size."""
    allocation, base, options = recipe.allocation, named_options(recipe.method), []
    assert allocation is not None
    sizes: list[dict[str, Any]] = [{"group_size": size} for size in GROUP_SIZES] if allocation.groups else [{}]
    for bits in range(1, 9):
        for size in sizes:
            try:
                options.append(build_method({**base, "bits": bits, **size}))
            except ValidationError:  # a width or an option that the method does not have
                continue
    return options


def _stored(recipe: Recipe, method: Method, layer: Linear) -> int | None:
    if method.misfit(layer.shape) or (recipe.low_rank is not None and recipe.low_rank.misfit(layer.shape)):
        return None
    format = method.format if recipe.low_rank is None else recipe.low_rank.format(method.format)
    return 8 * sum(tensor.bytes for tensor in format.stored(layer.shape).values())


def _require_reachable(found: Choices) -> None:
    sizes = {name: [bits for bits in stored if bits is not None] for name, stored in found.stored.items()}
    if misfits := [name for name, bits in sizes.items() if not bits]:
        reason = found.options[0].misfit(next(layer.shape for layer in found.layers if layer.name == misfits[0]))
        raise found.recipe.located([Issue(("method",), f"{reason}: {misfits[0]}")])
    if not sizes:
        raise found.recipe.located([Issue(("method", "bits"), "auto: overrides take every layer")])
    low, high = ((found.fixed + sum(map(end, sizes.values()))) / found.weights for end in (min, max))
    if not low <= _target(found.recipe) < high:
        message = f"must be within {low:.4g} and {high:.4g}, what {found.recipe.method.name} reaches on this model"
        raise found.recipe.located([Issue(("method", "target_bpw"), message)])


def _near_the_target(found: Choices) -> Choices:
    """Only options that some layer might take; each costs a pass over the model."""
    aim = found.budget / sum(prod(layer.shape) for layer in found.layers)
    shapes = {layer.name: prod(layer.shape) for layer in found.layers}

    def rate(option: int) -> float:
        fitting = [(bits, shapes[name]) for name, stored in found.stored.items() if (bits := stored[option])]
        return sum(bits for bits, _ in fitting) / sum(size for _, size in fitting) if fitting else float("inf")

    kept = [option for option in range(len(found.options)) if aim - _BELOW <= rate(option) <= aim + _ABOVE]
    return Choices(
        found.recipe,
        found.layers,
        [found.options[option] for option in kept],
        {name: [stored[option] for option in kept] for name, stored in found.stored.items()},
        found.fixed,
        found.weights,
    )


def _target(recipe: Recipe) -> float:
    assert recipe.allocation is not None
    return recipe.allocation.target_bpw

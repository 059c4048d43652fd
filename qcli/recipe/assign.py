"""Which method quantizes each layer of a model, and what in a recipe does not fit the model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from math import gcd
from typing import TYPE_CHECKING

from qcli.algorithms.method import Method
from qcli.algorithms.refine import Refine
from qcli.algorithms.transform import Transform
from qcli.recipe.errors import Issue
from qcli.recipe.plugins import EXPORTS
from qcli.recipe.recipe import Recipe
from qcli.recipe.yaml import KeyPath
from qcli.utils import registry

if TYPE_CHECKING:
    from qcli.models.families import Linear
    from qcli.models.vocabulary import Vocabulary
    from qcli.utils.dtypes import StoredTensor

GROUP_SIZE = "group_size"
_SMALLEST_GROUP = 16  # that a hint proposes: the tables of smaller ones take more than a bit per weight


def assign(recipe: Recipe, layers: Sequence[Linear]) -> dict[str, Method | None]:
    """The method of every layer by name, None where it stays dense.

    Raises:
        UsageError: overrides that take no layer, layers that their method cannot quantize, and steps that do not fit
            together; all of them.
    """
    matching = {layer.name: recipe.matching_overrides(layer.name) for layer in layers}
    methods = recipe.override_methods()
    assigned = {name: methods[rules[0]] if rules else recipe.method for name, rules in matching.items()}
    problems = [
        *_idle_overrides(recipe, list(matching.values())),
        *_misfits(recipe, layers, assigned),
        *_unfit_formats(recipe, assigned),
        *_overridden_steps(recipe, methods),
    ]
    if layers and not any(assigned.values()):
        problems.append(Issue(("overrides",), "every layer stays dense: nothing to quantize"))
    if problems:
        raise recipe.located(problems, hint=_hint(recipe, layers, problems))
    return assigned


def _idle_overrides(recipe: Recipe, matching: Sequence[Sequence[int]]) -> list[Issue]:
    """Overrides that take no layer."""
    matched = {i for rules in matching for i in rules}
    taken = {rules[0] for rules in matching if rules}
    return [
        Issue(
            ("overrides", i, "match"),
            f"{rule.match!r} matches " + ("only layers that earlier overrides take" if i in matched else "no layer"),
        )
        for i, rule in enumerate(recipe.overrides)
        if i not in taken
    ]


def _misfits(recipe: Recipe, layers: Sequence[Linear], assigned: Mapping[str, Method | None]) -> list[Issue]:
    """One line for layers that do not fit for the same reason; those that differ only in their block are named once."""
    counts: dict[tuple[KeyPath, str], Counter[str]] = defaultdict(Counter)
    for layer in layers:
        method = assigned[layer.name]
        if method is None:
            continue
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        if reason := method.unsupported_reason(layer.shape):
            counts[_key_of(recipe, layer.name, method), reason][kind] += 1
        if recipe.low_rank is not None and (reason := recipe.low_rank.unsupported_reason(layer.shape)):
            counts[("low_rank", "rank"), reason][kind] += 1
    return [
        Issue(path, f"{reason}: {', '.join(kinds)} ({(count := kinds.total())} layer{'s' if count > 1 else ''})")
        for (path, reason), kinds in counts.items()
    ]


def _key_of(recipe: Recipe, layer: str, method: Method) -> KeyPath:
    """The key that a layer does not fit: the group size of the override that it takes or of the recipe's method."""
    if GROUP_SIZE not in type(method).model_fields:
        return ("method",)
    for i in recipe.matching_overrides(layer)[:1]:
        if GROUP_SIZE in (recipe.overrides[i].method or {}):
            return ("overrides", i, "method", GROUP_SIZE)
    return ("method", GROUP_SIZE)


def vocabulary_methods(recipe: Recipe, vocabulary: Vocabulary, stored: Mapping[str, StoredTensor]) -> dict[str, Method]:
    """The methods of embedding and head by module name; of one that is shared by both, once.

    Raises:
        UsageError: the model has no head, options of one weight differ, or groups do not divide rows.
    """
    problems: list[Issue] = []
    chosen: dict[str, tuple[str, Method]] = {}
    if recipe.embeddings is not None:
        chosen[vocabulary.embedding] = ("embeddings", recipe.embeddings.as_method())
    if recipe.lm_head is not None:
        method = recipe.lm_head.as_method()
        if vocabulary.head is None:
            problems.append(Issue(("lm_head",), "the model has no head"))
        elif not vocabulary.tied:
            chosen[vocabulary.head] = ("lm_head", method)
        elif recipe.embeddings is not None and recipe.embeddings.as_method().format != method.format:
            message = f"the head shares the weights of {vocabulary.embedding}, which `lm_head` gives another format"
            problems.append(Issue(("embeddings",), f"{message}: leave one of the two out"))
        else:
            chosen[vocabulary.embedding] = ("lm_head", method)
    for name, (section, method) in chosen.items():
        rows, columns = stored[f"{name}.weight"].shape
        if reason := method.unsupported_reason((rows, columns)):
            problems.append(Issue((section, GROUP_SIZE), f"{reason}: {name}"))
    if problems:
        raise recipe.located(problems)
    return {name: method for name, (_, method) in chosen.items()}


def _unfit_formats(recipe: Recipe, assigned: Mapping[str, Method | None]) -> list[Issue]:
    """Formats that a transform or the reconstruction cannot work on."""
    formats = dict.fromkeys(method.format for method in assigned.values() if method is not None)
    steps: list[tuple[KeyPath, Transform | Refine]] = [*recipe.transforms_by_path()]
    if recipe.refinement is not None:
        steps.append((("refine",), recipe.refinement))
    problems = [
        Issue(path, reason) for path, step in steps for format in formats if (reason := step.unsupported_reason(format))
    ]
    if not all(format.rounds for format in formats):
        problems += _needless_steps(recipe)
    return problems


def _needless_steps(recipe: Recipe) -> list[Issue]:
    """Sections that contradict weights in full precision."""
    problems = []
    if recipe.activations is None:
        message = "required by method full-precision, which quantizes inputs alone"
        problems.append(Issue(("activations",), f"{message}; `dense: true` in an override leaves layers as they are"))
    for name in ("low_rank", "refine", "distill"):
        if getattr(recipe, name) is not None:
            problems.append(Issue((name,), "weights in full precision have no error to reduce"))
    return problems


def _overridden_steps(recipe: Recipe, methods: Sequence[Method | None]) -> list[Issue]:
    """Overrides whose transforms or reconstruction are not those of the block around their layers."""
    problems = []
    own = (recipe.method.transforms, recipe.method.refine)
    for i, method in enumerate(methods):
        if method is None:
            continue
        steps = (method.transforms, method.refine)
        if steps != own and (any(steps) or method.name == recipe.method.name):
            message = f"{method.name} transforms or reconstructs whole blocks, not single layers"
            problems.append(Issue(("overrides", i, "method"), f"{message}: set its steps in the recipe's method"))
    return problems


def _hint(recipe: Recipe, layers: Sequence[Linear], problems: Sequence[Issue]) -> str | None:
    paths = [problem.path for problem in problems if problem.path[-1] == GROUP_SIZE]
    if paths:
        flags = all(recipe.origin(path).startswith("--group") for path in paths) or not recipe.has_file
        tail = "--group-tail ragged" if flags else "`group_tail: ragged`"
        ragged = f"{tail} allows a shorter last group"
        divisor = gcd(*(layer.shape[1] for layer in layers))
        size = divisor & -divisor
        fitting = f"{'--group-size ' if flags else '`group_size: '}{size}{'' if flags else '`'} divides every row"
        packable = recipe.pack is None or registry.load(EXPORTS, recipe.pack.format).ragged_groups
        return "; ".join([fitting] * (size >= _SMALLEST_GROUP) + [ragged] * packable) or None
    if layers and any(problem.path[0] == "overrides" for problem in problems):
        return f"layers have names like {layers[0].name}"
    return None

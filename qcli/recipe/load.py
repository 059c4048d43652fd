"""A recipe from a file, `--set` and flags: everything that is wrong is told at once, each with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qcli.algorithms.method import Method
from qcli.algorithms.transform import Transform
from qcli.recipe.allocation import Allocation, split
from qcli.recipe.draft import Draft
from qcli.recipe.errors import Issue, Origins, issues, unknown
from qcli.recipe.plugins import DEFAULT_METHOD, METHODS, TRANSFORMS, Model, derived, named_fields, strictly
from qcli.recipe.recipe import Recipe
from qcli.recipe.yaml import KeyPath
from qcli.utils import registry
from qcli.utils.errors import UsageError

_FLAGS = {  # flags that are not named after the last part of their path
    "model": "MODEL",
    "method.name": "--method",
    "method.symmetric": "--symmetric/--asymmetric",
}


def load_recipe(path: Path | None, flags: Mapping[str, Any], sets: Sequence[str] = ()) -> tuple[Recipe, Origins]:
    """The recipe that flags, `--set`, a file and the defaults give, in this order of precedence.

    Args:
        path: a YAML file, or None.
        flags: values by dotted path (`method.bits`); None means not given.
        sets: `a.b=c` texts, c in YAML.

    Raises:
        UsageError: everything that is wrong, a line each.
    """
    draft = Draft()
    if path is not None:
        draft.add_file(path)
    for text in sets:
        draft.add_set(text)
    for name, value in flags.items():
        if value is not None:
            draft.put(name.split("."), value, _FLAGS.get(name, "--" + name.rpartition(".")[2].replace("_", "-")))
    return checked(draft), draft.origins


def from_flags(cls: type[Model], values: Mapping[str, Any]) -> Model:
    """One section of a recipe (`Pack`) from flags named as its fields.

    Raises:
        UsageError: everything that is wrong, a line each.
    """
    try:
        return strictly(cls, values)
    except ValidationError as error:
        flags = Origins(by_path={(name,): _flag(name) for name in values})
        raise flags.error(list(issues(error, cls))) from None


def _flag(path: str) -> str:
    return _FLAGS.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))


def checked(draft: Draft) -> Recipe:
    """The valid recipe, or every error at once."""
    found: list[Issue] = []
    rest = {key: value for key, value in draft.data.items() if key not in ("method", "transforms")}
    recipe: Recipe | None = None
    try:
        recipe = strictly(Recipe, rest)
    except ValidationError as error:
        found += issues(error, Recipe)
    given, allocation = _split_allocation(draft.data.get("method", {}), found)
    method = _checked_method(given, ("method",), found)
    transforms = _checked_transforms(draft.data.get("transforms", []), found)
    inherited = named_fields(method) if method else {"name": given.get("name")} if isinstance(given, dict) else {}
    rules = draft.data.get("overrides")
    for i, rule in enumerate(rules if isinstance(rules, list) else []):
        partial = rule.get("method") if isinstance(rule, dict) else None
        if isinstance(partial, dict):
            _checked_method(derived(inherited, partial), ("overrides", i, "method"), found)
    lines = draft.lines + [draft.origins.line(issue) for issue in found if not draft.is_spoilt(issue.path)]
    if recipe is None or method is None or lines:
        raise UsageError("\n".join(dict.fromkeys(lines)), hint=_usage_hint(found))
    recipe = recipe.model_copy(update={"method": method, "transforms": transforms})
    recipe._origins, recipe._allocation = draft.origins, allocation
    if problems := recipe.contradictions():
        raise draft.origins.error(problems)
    return recipe


def _split_allocation(given: Any, found: list[Issue]) -> tuple[Any, Allocation | None]:
    """A method without `bits: auto` and what belongs to it, and that by itself."""
    if not isinstance(given, dict):
        return given, None
    rest, wanted, problems = split(given)
    found += problems
    try:
        return rest, None if wanted is None else strictly(Allocation, wanted)
    except ValidationError as error:
        found += issues(error, Allocation, ("method",))
        return rest, None


def _checked_method(fields: Any, path: KeyPath, found: list[Issue]) -> Method | None:
    if not isinstance(fields, dict):
        found.append(Issue(path, "must be a mapping of keys to values, as {name: rtn, bits: 4}"))
        return None
    checked: Method | None = _checked_plugin("method", METHODS, {"name": DEFAULT_METHOD} | fields, path, found)
    return checked


def _checked_transforms(given: Any, found: list[Issue]) -> list[Transform]:
    if not isinstance(given, list):
        found.append(Issue(("transforms",), "must be a list, as [{name: teq}]"))
        return []
    transforms: list[Transform] = []
    for i, entry in enumerate(given):
        fields = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, dict) or "name" not in fields:
            found.append(Issue(("transforms", i), "must be a name, or a mapping as {name: teq, steps: 200}"))
        elif checked := _checked_plugin("transform", TRANSFORMS, fields, ("transforms", i), found):
            transforms.append(checked)
    return transforms


def _checked_plugin(kind: str, package: str, fields: dict[str, Any], path: KeyPath, found: list[Issue]) -> Any:
    name, known = fields["name"], registry.names(package)
    if name not in known:
        found.append(Issue((*path, "name"), unknown(f"{kind} {name!r}", str(name), known)))
        return None
    cls = registry.load(package, name)
    try:
        return strictly(cls, {key: value for key, value in fields.items() if key != "name"})
    except ValidationError as error:
        found += issues(error, cls, path, owner=f"{kind} {name!r} has")
        return None


def _usage_hint(found: Sequence[Issue]) -> str | None:
    if Issue(("model",), "required") in found:
        return "give MODEL, or --recipe FILE that has `model:`"
    return None

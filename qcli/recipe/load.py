"""A recipe from a file, `--set` and flags: everything that is wrong is told at once, each with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qcli.recipe.draft import Draft
from qcli.recipe.errors import Issue, Origins, issues
from qcli.recipe.recipe import Recipe
from qcli.utils.errors import UsageError

Section = TypeVar("Section", bound=BaseModel)
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


def from_flags(cls: type[Section], values: Mapping[str, Any]) -> Section:
    """One section of a recipe (`Pack`) from flags named as its fields.

    Raises:
        UsageError: everything that is wrong, a line each.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        flags = Origins(by_path={(name,): _flag(name) for name in values})
        raise flags.error(issues(error, cls)) from None


def _flag(path: str) -> str:
    return _FLAGS.get(path, "--" + path.rpartition(".")[2].replace("_", "-"))


def checked(draft: Draft) -> Recipe:
    """The recipe that a draft's values say.

    Raises:
        UsageError: everything that is wrong with them, or was before, a line each.
    """
    recipe, problems = None, list[Issue]()
    try:
        recipe = Recipe.model_validate(draft.data, context={"origins": draft.origins})
    except ValidationError as error:
        problems = issues(error, Recipe)
    lines = draft.lines + [draft.origins.line(problem) for problem in problems if not draft.is_spoilt(problem.path)]
    if recipe is None or lines:
        raise UsageError("\n".join(dict.fromkeys(lines)), hint=_usage_hint(problems))
    return recipe


def _usage_hint(problems: Sequence[Issue]) -> str | None:
    if Issue(("model",), "required") in problems:
        return "give MODEL, or --recipe FILE that has `model:`"
    return None

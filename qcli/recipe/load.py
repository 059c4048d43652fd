"""Recipes from a file, `--set` and flags: errors are reported all at once, each with its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qcli.data.datasets import is_folder
from qcli.data.stored_windows import stored_windows
from qcli.recipe.draft import Draft, flag_name
from qcli.recipe.errors import Issue, issues
from qcli.recipe.origins import Origins
from qcli.recipe.recipe import Recipe
from qcli.utils.errors import UsageError

Section = TypeVar("Section", bound=BaseModel)
_NO_MODEL = Issue(("model",), "required")


def load_recipe(
    path: Path | None, flags: Mapping[str, Any], sets: Sequence[str] = (), *, model_by: str = "MODEL"
) -> Recipe:
    """The recipe that flags, `--set`, a file and the defaults give, in this order of precedence.

    Args:
        path: a YAML file, or None.
        flags: values by dotted path (`method.bits`); None means not given.
        sets: `a.b=c` texts, c in YAML.
        model_by: how the command is given the model, for the error if it is not.

    Raises:
        UsageError: everything that is wrong, a line each.
    """
    draft = Draft()
    if path is not None:
        draft.add_file(path)
        if "base" in draft.data and "model" not in draft.data:
            raise UsageError(f"{path} is a study, not a recipe", hint=f"`qcli study {path} --dry-run` checks it")
    for text in sets:
        draft.add_set(text)
    for name, value in flags.items():
        if value is not None:
            draft.add_flag(name, value)
    return checked(draft, model_by)


def from_flags(cls: type[Section], values: Mapping[str, Any]) -> Section:
    """One section of a recipe, such as `Pack`, from flags that are named after its fields.

    Raises:
        UsageError: everything that is wrong, a line each.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        flags = Origins(by_path={(name,): flag_name(name) for name in values})
        raise flags.error(issues(error, cls)) from None


def checked(draft: Draft, model_by: str = "MODEL") -> Recipe:
    """The recipe of a draft's values.

    Args:
        model_by: as in `load_recipe`.

    Raises:
        UsageError: everything that is wrong with them, and the draft's own errors, a line each.
    """
    recipe, problems = None, list[Issue]()
    try:
        recipe = Recipe.model_validate(draft.data, context={"origins": draft.origins})
    except ValidationError as error:
        problems = issues(error, Recipe)
    hint = None
    if _NO_MODEL in problems and draft.origins.source is None:
        problems[problems.index(_NO_MODEL)] = Issue((), f"{model_by}: required")
        hint = f"give {model_by}{'' if model_by == 'MODEL' else ' MODEL'}, or a --recipe FILE that sets `model:`"
    elif _NO_MODEL in problems:
        hint = "the file names the model: `model: FOLDER`, or a hub id such as org/name"
    lines = draft.lines + [draft.origins.line(problem) for problem in problems if not draft.was_refused(problem.path)]
    lines += [] if recipe is None else _without_effect(recipe)
    if recipe is None or lines:
        raise UsageError(*draft.origins.in_order(lines), hint=hint)
    return recipe


def _without_effect(recipe: Recipe) -> list[str]:
    """Flags that ask for other windows than those of a calibration folder, which are used as they are."""
    texts = {"calibration": recipe.calibration} | ({} if recipe.distill is None else {"distill": recipe.distill_text})
    lines = []
    for section, text in texts.items():
        if not is_folder(text.data) or (stored := stored_windows(Path(text.data))) is None:
            continue
        for name, value, count in zip(("samples", "seq_len"), (text.samples, text.seq_len), stored, strict=True):
            origin = recipe.origin((section, name))
            if origin.startswith("-") and value != count:
                lines.append(f"{origin}: {text.data} has {stored[0]} samples of {stored[1]} tokens, used as they are")
    return lines

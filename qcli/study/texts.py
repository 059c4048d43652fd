"""The text of a study where its recipes name none: one for all runs, and the same again when the study goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from qcli.data.default_text import ON_HUB, WITHOUT_HUB, default_text
from qcli.recipe.auto_text import auto_fields, flags_for, with_text
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Eval
from qcli.study.grid import Run, address_of


def with_texts(runs: Sequence[Run], addressed: Callable[[list[Run]], list[Run]], known: Collection[str]) -> list[Run]:
    """The runs with a name wherever a recipe says `auto`: that of the study's finished runs, else the default here.

    Args:
        addressed: gives runs the addresses of their rows.
        known: addresses of finished runs.
    """
    fields = dict.fromkeys(field for run in runs for field in auto_fields(_evaluated(run.recipe)))
    if not fields:
        return addressed(list(runs))
    for text in (ON_HUB, WITHOUT_HUB):
        named = addressed([_named(run, text) for run in runs])
        if any(run.address in known for run in named):
            return named
    text = default_text(flags_for(fields))
    return addressed([_named(run, text) for run in runs])


def _named(run: Run, text: str) -> Run:
    recipe = _evaluated(run.recipe)
    if not auto_fields(recipe):
        return run
    recipe = with_text(recipe, text)
    return replace(run, recipe=recipe, address=address_of(recipe))


def _evaluated(recipe: Recipe) -> Recipe:
    """With the evaluation that every run of a study has."""
    return recipe.model_copy(update={"eval": recipe.eval or Eval()})

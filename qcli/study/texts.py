"""The text of a study where its recipes name none: one for all runs, and the same again when the study goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from qcli.data.default_text import ON_HUB, WITHOUT_HUB, default_text
from qcli.recipe.auto_text import says_auto, with_text
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Eval
from qcli.study.grid import Run, address_of


def with_texts(runs: Sequence[Run], addressed: Callable[[list[Run]], list[Run]], known: Collection[str]) -> list[Run]:
    """The runs with a name wherever a recipe says `auto`: that of the study's finished runs, else the default here.

    Args:
        addressed: gives runs the addresses of their rows.
        known: addresses of finished runs.
    """
    if not any(_is_open(run.recipe) for run in runs):
        return addressed(list(runs))
    for text in (ON_HUB, WITHOUT_HUB):
        named = addressed([_named(run, text) for run in runs])
        if any(run.address in known for run in named):
            return named
    return addressed([_named(run, default_text()) for run in runs])


def _is_open(recipe: Recipe) -> bool:
    return says_auto(_evaluated(recipe))


def _named(run: Run, text: str) -> Run:
    if not _is_open(run.recipe):
        return run
    recipe = with_text(_evaluated(run.recipe), text)
    return replace(run, recipe=recipe, address=address_of(recipe))


def _evaluated(recipe: Recipe) -> Recipe:
    """With the evaluation that every run of a study has."""
    return recipe.model_copy(update={"eval": recipe.eval or Eval()})

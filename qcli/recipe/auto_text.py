"""A recipe that says `auto`, and the same with the name of the text that stands for it. No torch."""

from __future__ import annotations

from qcli.data.default_text import AUTO
from qcli.recipe.recipe import Recipe


def says_auto(recipe: Recipe, *, calibrated: bool = True) -> bool:
    """Whether `auto` is a text that the recipe's stages read.

    Args:
        calibrated: whether quantization reads the text of `calibration`.
    """
    texts = [] if recipe.eval is None else [*recipe.eval.perplexity]
    calibration = [recipe.calibration.data] if calibrated else []
    distillation = [recipe.distill_text.data] if recipe.distill is not None else []
    return AUTO in (*texts, *calibration, *distillation)


def with_text(recipe: Recipe, text: str) -> Recipe:
    """The recipe with `text` wherever it says `auto`."""
    changed: dict[str, object] = {}
    if recipe.calibration.data == AUTO:
        changed["calibration"] = recipe.calibration.model_copy(update={"data": text})
    if recipe.distill is not None and recipe.distill.data == AUTO:
        changed["distill"] = recipe.distill.model_copy(update={"data": text})
    if recipe.eval is not None:
        named = [text if data == AUTO else data for data in recipe.eval.perplexity]
        changed["eval"] = recipe.eval.model_copy(update={"perplexity": named})
    return recipe.model_copy(update=changed)

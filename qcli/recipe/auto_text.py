"""A recipe that says `auto`, and the same with the name of the text that stands for it. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from qcli.data.default_text import AUTO
from qcli.recipe.recipe import Recipe

_TEXTS = "eval.perplexity"


def auto_fields(recipe: Recipe, *, calibrated: bool = True) -> list[str]:
    """The fields that say `auto`, of those whose texts the recipe's stages read.

    Args:
        calibrated: whether quantization reads the text of `calibration`.
    """
    distill, evaluation = recipe.distill, recipe.eval
    calibrated = calibrated or (distill is not None and distill.data is None)
    says = {
        "calibration.data": calibrated and recipe.calibration.data == AUTO,
        "distill.data": distill is not None and distill.data == AUTO,
        _TEXTS: evaluation is not None and AUTO in evaluation.perplexity,
    }
    return [field for field, auto in says.items() if auto]


def flags_for(fields: Iterable[str]) -> str:
    """The flags that name a text for each of these fields."""
    return " ".join(f"--set '{field}=[TEXT]'" if field == _TEXTS else f"--set {field}=TEXT" for field in fields)


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

"""What a recipe's `eval` section asks for, and the measurement it names."""

from __future__ import annotations

from pathlib import Path

from qcli.cache import Cache
from qcli.evaluate import evaluate
from qcli.evaluation import Evaluation
from qcli.progress import Progress, silent
from qcli.recipe import Recipe
from qcli.recipe_sections import Eval
from qcli.tasks import Tasks


def asked_tasks(recipe: Recipe) -> Tasks | None:
    """The tasks that the recipe names; None: none.

    Raises:
        UsageError: there are no such tasks.
        UnsupportedError: lm-eval is not installed.
    """
    asked = recipe.eval
    if asked is None or not asked.tasks:
        return None
    return Tasks(asked.tasks, asked.include_path, asked.limit, asked.fewshot)


def evaluate_as_asked(
    recipe: Recipe, model: Path, tasks: Tasks | None, cache: Cache, progress: Progress = silent
) -> Evaluation:
    """Measure what was made of the recipe's model; without an `eval` section as its defaults say.

    Args:
        tasks: from `asked_tasks`.
        cache: keeps what the baseline gives.
    """
    asked = recipe.eval or Eval()
    return evaluate(
        str(model),
        baseline=asked.baseline or recipe.model,
        data=asked.perplexity,
        window=asked.window,
        max_windows=asked.max_windows,
        tasks=tasks,
        cache=cache,
        device=recipe.device,
        progress=progress,
    )

"""What a recipe's `eval` section asks for, and the measurement it names."""

from __future__ import annotations

from pathlib import Path

from qcli.data.datasets import SELF
from qcli.evaluation.evaluate import evaluate, windows_of
from qcli.evaluation.results import Evaluation
from qcli.evaluation.tasks import Tasks
from qcli.models.open import Source, open_source
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Eval
from qcli.utils.cache import Cache
from qcli.utils.device import resolve_device
from qcli.utils.progress import Progress, silent


def asked_tasks(recipe: Recipe) -> Tasks | None:
    """The tasks that the recipe names; None: none.

    Raises:
        UsageError: there are no such tasks, or a gate names a group that has no score.
    """
    asked = recipe.eval
    if asked is None or not asked.tasks:
        return None
    tasks = Tasks(asked.tasks, asked.include_path, asked.limit, asked.fewshot)
    tasks.require_scores(asked.gates.min_task if asked.gates is not None else ())
    return tasks


def require_evaluation_texts(
    recipe: Recipe, source: Source, progress: Progress = silent, cache: Cache | None = None
) -> None:
    """Read what the recipe's model will be evaluated on, so that a wrong name or a short text costs no work.

    Args:
        source: the recipe's model.
        cache: keeps what was read for `evaluate_as_asked`; None: nothing is kept.

    Raises:
        UsageError: as `evaluate` does.
    """
    asked = recipe.eval or Eval()
    models = [source] if asked.baseline is None else [source, open_source(asked.baseline)]
    texts = [name for name in asked.perplexity if name != SELF]
    device = resolve_device(recipe.device)
    windows_of(texts, models, asked.window, asked.max_windows, device, cache or Cache(None), progress)


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

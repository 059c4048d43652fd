"""The evaluation that a recipe's `eval` section describes."""

from __future__ import annotations

from pathlib import Path

from qcli.data.names import SELF
from qcli.data.source import TextSource
from qcli.evaluation.evaluate import evaluate
from qcli.evaluation.options import EvalOptions
from qcli.evaluation.results import Evaluation
from qcli.evaluation.tasks import Tasks
from qcli.evaluation.windows import evaluation_windows
from qcli.models.open import ModelSource, open_source
from qcli.recipe.recipe import Recipe
from qcli.recipe.sections import Eval
from qcli.utils.cache import Cache
from qcli.utils.progress import Progress, silent
from qcli.utils.trust import NOTHING, Trust


def recipe_tasks(recipe: Recipe, trust: Trust = NOTHING) -> Tasks | None:
    """The tasks that the recipe names; None: none.

    Raises:
        UsageError: there are no such tasks, or a gate names a group that has no score.
    """
    section = recipe.eval
    if section is None or not section.tasks:
        return None
    tasks = Tasks(
        section.tasks,
        section.include_path,
        section.limit,
        section.fewshot,
        chat=section.apply_chat_template,
        batch_size=section.task_batch_size,
        trusted=trust.tasks,
    )
    tasks.require_scores(section.gates.min_task if section.gates is not None else ())
    return tasks


def require_evaluation_texts(
    recipe: Recipe,
    source: ModelSource,
    progress: Progress = silent,
    cache: Cache | None = None,
    *,
    trust: Trust = NOTHING,
) -> None:
    """Tokenize what the recipe's model will be evaluated on, so that a wrong name or a short text fails early.

    Args:
        source: the recipe's model.
        cache: keeps the windows for `evaluate_recipe`; None: nothing is kept.

    Raises:
        UsageError: as `evaluate` does.
    """
    section = recipe.eval or Eval()
    sources = [source] if section.baseline is None else [source, open_source(section.baseline, trust)]
    options = _options(recipe, [name for name in section.perplexity if name != SELF], None, trust)
    evaluation_windows(options, sources, cache or Cache(None), progress)


def evaluate_recipe(
    recipe: Recipe,
    model: Path,
    tasks: Tasks | None,
    cache: Cache,
    progress: Progress = silent,
    *,
    trust: Trust = NOTHING,
) -> Evaluation:
    """Measure a checkpoint that was made from the recipe's model; without an `eval` section by its defaults.

    Args:
        tasks: from `recipe_tasks`.
        cache: keeps what the baseline gives.
    """
    section = recipe.eval or Eval()
    baseline = section.baseline or recipe.source
    options = _options(recipe, section.perplexity, tasks, trust)
    return evaluate(str(model), options, baseline=baseline, cache=cache, progress=progress)


def _options(recipe: Recipe, texts: list[str | TextSource], tasks: Tasks | None, trust: Trust) -> EvalOptions:
    section = recipe.eval or Eval()
    return EvalOptions(
        texts,
        section.window,
        section.max_windows,
        tasks,
        device=recipe.device,
        max_memory=recipe.max_memory,
        trust=trust,
        bos=recipe.bos,
    )

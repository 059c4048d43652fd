"""Results of lm-eval tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qcli.utils.errors import UsageError

_MAIN = ("acc", "exact_match", "f1")  # preferred for gates and tables, in this order; else a task's first metric


@dataclass(frozen=True)
class TaskResult:
    """A model's result in one task, or in a group of tasks that has a score of its own.

    Attributes:
        metric: the main one; with its filter, as `exact_match (strict-match)`, where lm-eval filters answers in
            several ways: the first one counts.
        score, stderr: its value and standard error.
        metrics: all that the task computes.
        samples: number of questions; of a group, in all its tasks.
        version: of the task's definition.
        higher_is_better: false for metrics such as perplexity.
        bos: whether prompts begin with a begin token.
        chat: whether questions were put into the model's chat template.
    """

    metric: str
    score: float
    stderr: float | None
    metrics: dict[str, float]
    samples: int
    version: str
    higher_is_better: bool
    bos: bool
    chat: bool


def task_results(output: Mapping[str, Any], *, bos: bool, chat: bool) -> dict[str, TaskResult]:
    """By task or group, all that have a score in lm-eval's output.

    Raises:
        UsageError: a task gives no number.
    """
    return {task: _result(task, output, bos=bos, chat=chat) for task in output["results"] if _has_score(task, output)}


def _has_score(task: str, output: Mapping[str, Any]) -> bool:
    """Whether this is a task with questions, or a group that lm-eval has aggregated."""
    return bool(output["n-samples"].get(task)) or any("," in key for key in output["results"][task])


def _result(task: str, output: Mapping[str, Any], *, bos: bool, chat: bool) -> TaskResult:
    """From lm-eval's `{"acc,none": .., "acc_stderr,none": ..}`, where a filter follows the comma."""
    values = {tuple(key.split(",", 1)): value for key, value in output["results"][task].items() if "," in key}
    scores = {
        key: float(value) for key, value in values.items() if not key[0].endswith("_stderr") and _is_number(value)
    }
    if not scores:
        raise UsageError(f"task {task} gives no number")
    several = len({filter for _, filter in scores}) > 1
    main = next((key for name in _MAIN for key in scores if key[0] == name), next(iter(scores)))
    labels = {(name, filter): f"{name} ({filter})" if several else name for name, filter in scores}
    stderr = values.get((f"{main[0]}_stderr", main[1]), math.nan)
    leaves = list(_leaves(task, output))
    # lm-eval gives no direction for a metric that only a task's code computes: most of those are accuracies.
    directions = [output["higher_is_better"].get(leaf, {}).get(main[0]) for leaf in leaves]
    return TaskResult(
        metric=labels[main],
        score=scores[main],
        stderr=float(stderr) if _is_number(stderr) and math.isfinite(stderr) else None,
        metrics={labels[key]: score for key, score in scores.items()},
        samples=sum(int(output["n-samples"][leaf]["effective"]) for leaf in leaves),
        version=str(output["versions"].get(task)),
        higher_is_better=False not in directions,
        bos=bos,
        chat=chat,
    )


def _leaves(task: str, output: Mapping[str, Any]) -> Iterator[str]:
    """The tasks of a group, those of nested groups too; a task itself."""
    members = output["group_subtasks"].get(task)
    if members is None:
        yield task
    else:
        for member in members:
            yield from _leaves(member, output)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

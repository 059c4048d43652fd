"""Quality gates: bounds on the quality loss of a model, beyond which a run fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field, FiniteFloat, model_validator

from qcli.utils.errors import VerificationError
from qcli.utils.options import Options


class Verdict(NamedTuple):
    """What one gate says about a model.

    Attributes:
        name: of the gate, such as `max_kl`.
        of: the text or task that it bounds; None: the mean over all.
        limit, value: the bound and what was measured; a value of None is not finite, or there is none.
        words: why it fails, if it does.
    """

    name: str
    of: str | None
    limit: float
    value: float | None
    ok: bool
    words: str

    def to_json(self) -> dict[str, Any]:
        """All but the words as plain data."""
        return {"name": self.name, "of": self.of, "limit": self.limit, "value": self.value, "ok": self.ok}


class Gates(Options):
    """Bounds on what `qcli eval` measures; a value that is not finite fails every bound.

    `min_task` and `max_task_drop` bound a task's main metric: accuracy where it has one. Where lower is better, as in
    a perplexity, a rise counts as the drop, and `min_task` always fails.
    """

    max_kl: float | None = Field(default=None, ge=0, description="KL divergence from the baseline, nats per token")
    max_window_kl: float | None = Field(default=None, ge=0, description="max_kl of the worst window of every text")
    max_ppl_ratio: float | None = Field(
        default=None, gt=0, description="perplexity relative to the baseline's, on every text"
    )
    min_task: dict[str, FiniteFloat] = Field(default={}, description="lowest score of a task, as {arc_easy: 0.40}")
    max_task_drop: float | None = Field(
        default=None, ge=0, description="how far any task's score may fall below the baseline's"
    )

    @model_validator(mode="after")
    def _not_empty(self) -> Gates:
        if not self:
            raise ValueError("names no gate")
        return self

    def __bool__(self) -> bool:
        return self.needs_baseline or bool(self.min_task)

    @property
    def needs_baseline(self) -> bool:
        """Whether any bound is relative to another model."""
        bounds = (self.max_kl, self.max_window_kl, self.max_ppl_ratio, self.max_task_drop)
        return any(bound is not None for bound in bounds)

    def verdicts(self, evaluation: Mapping[str, Any]) -> Iterator[Verdict]:
        """Every gate and what it bounds: one verdict for each text or task.

        Args:
            evaluation: `Evaluation.to_json` of the model; with a baseline, if the gates need one.
        """
        texts, tasks = evaluation["perplexity"], evaluation["tasks"]
        if (limit := self.max_kl) is not None:
            value = evaluation["kl"]
            words = f"max_kl {limit:g}: KL is {_number(value)}"
            yield Verdict("max_kl", None, limit, value, _at_most(value, limit), words)
        if (limit := self.max_window_kl) is not None:
            for data, score in texts.items():
                value = score["worst_window_kl"]
                words = f"max_window_kl {limit:g}: KL is {_number(value)} in window {score['worst_window']} of {data}"
                yield Verdict("max_window_kl", data, limit, value, _at_most(value, limit), words)
        if (limit := self.max_ppl_ratio) is not None:
            for data, score in texts.items():
                before = evaluation["baseline"]["perplexity"][data]
                value = score["value"] / before if score["value"] is not None and before else None
                words = f"max_ppl_ratio {limit:g}: the ratio on {data} is {_number(value)}"
                yield Verdict("max_ppl_ratio", data, limit, value, _at_most(value, limit), words)
        for task, limit in self.min_task.items():
            yield _task_verdict(task, limit, tasks.get(task))
        if (limit := self.max_task_drop) is not None:
            for task, result in tasks.items():
                change = result["score"] - result["baseline"]
                drop = -change if _higher_is_better(result) else change
                words = f"max_task_drop {limit:g}: {task} lost {_number(drop)}"
                yield Verdict("max_task_drop", task, limit, drop, _at_most(drop, limit), words)

    def failures(self, evaluation: Mapping[str, Any]) -> Iterator[str]:
        """The gates that a model fails, in words; see `verdicts`."""
        return (verdict.words for verdict in self.verdicts(evaluation) if not verdict.ok)


class GateError(VerificationError):
    """A model fails a quality gate."""


def require(gates: Gates | None, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Check that all models pass all gates.

    Args:
        evaluations: of each model, as for `Gates.verdicts`.

    Raises:
        GateError: one line for every model and gate that it fails.
    """
    if gates is None:
        return
    failed = [
        f"{evaluation['model']}: gate {failure}" for evaluation in evaluations for failure in gates.failures(evaluation)
    ]
    if failed:
        raise GateError(*failed, hint="use more bits, smaller groups or `refine`, or relax the gate")


def _task_verdict(task: str, limit: float, result: Mapping[str, Any] | None) -> Verdict:
    gate = f"min_task {task}={limit:g}"
    if result is None:
        return Verdict("min_task", task, limit, None, False, f"{gate}: it has no score")
    score = result["score"]
    if not _higher_is_better(result):
        words = f"{gate}: it bounds scores where higher is better, not {result['metric']}"
        return Verdict("min_task", task, limit, score, False, words)
    return Verdict("min_task", task, limit, score, score >= limit, f"{gate}: its score is {_number(score)}")


def _higher_is_better(result: Mapping[str, Any]) -> bool:
    return bool(result.get("higher_is_better", True))  # absent from results of older runs, which are accuracies


def _at_most(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"

"""Quality gates: bounds on the quality loss of a model, beyond which a run fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, FiniteFloat, model_validator

from qcli.utils.errors import VerificationError
from qcli.utils.options import Options


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

    def failures(self, evaluation: Mapping[str, Any]) -> Iterator[str]:
        """The gates that a model fails, in words.

        Args:
            evaluation: `Evaluation.to_json` of the model; with a baseline, if the gates need one.
        """
        texts, tasks = evaluation["perplexity"], evaluation["tasks"]
        if self.max_kl is not None and not _at_most(evaluation["kl"], self.max_kl):
            yield f"max_kl {self.max_kl:g}: KL is {_number(evaluation['kl'])}"
        if self.max_window_kl is not None:
            for data, score in texts.items():
                if not _at_most(score["worst_window_kl"], self.max_window_kl):
                    window, kl = score["worst_window"], _number(score["worst_window_kl"])
                    yield f"max_window_kl {self.max_window_kl:g}: KL is {kl} in window {window} of {data}"
        if self.max_ppl_ratio is not None:
            for data, score in texts.items():
                before = evaluation["baseline"]["perplexity"][data]
                ratio = score["value"] / before if score["value"] is not None and before else None
                if not _at_most(ratio, self.max_ppl_ratio):
                    yield f"max_ppl_ratio {self.max_ppl_ratio:g}: the ratio on {data} is {_number(ratio)}"
        for task, bound in self.min_task.items():
            result = tasks.get(task)
            if result is None:
                yield f"min_task {task}={bound:g}: it has no score"
            elif not _higher_is_better(result):
                yield f"min_task {task}={bound:g}: it bounds scores where higher is better, not {result['metric']}"
            elif not result["score"] >= bound:
                yield f"min_task {task}={bound:g}: its score is {_number(result['score'])}"
        if self.max_task_drop is not None:
            for task, result in tasks.items():
                change = result["score"] - result["baseline"]
                drop = -change if _higher_is_better(result) else change
                if not drop <= self.max_task_drop:
                    yield f"max_task_drop {self.max_task_drop:g}: {task} lost {_number(drop)}"


class GateError(VerificationError):
    """A model fails a quality gate."""


def require(gates: Gates | None, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Check that all models pass all gates.

    Args:
        evaluations: of each model, as for `Gates.failures`.

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


def _higher_is_better(result: Mapping[str, Any]) -> bool:
    return bool(result.get("higher_is_better", True))  # absent from results of older runs, which are accuracies


def _at_most(value: float | None, bound: float) -> bool:
    return value is not None and value <= bound


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"

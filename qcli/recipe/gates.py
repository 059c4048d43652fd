"""Quality gates: how much a model may lose before a run counts as failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, FiniteFloat, model_validator

from qcli.utils.errors import VerificationError
from qcli.utils.options import Options


class Gates(Options):
    """Bounds on what `qcli eval` measures; what is not finite passes none.

    `min_task` and `max_task_drop` look at a task's main metric: accuracy where it has one. Where a lower value is the
    better one, as of a perplexity, a rise is the drop, and `min_task` fails whatever the value.
    """

    max_kl: float | None = Field(default=None, ge=0, description="KL divergence to the baseline, nats a token")
    max_window_kl: float | None = Field(default=None, ge=0, description="the same, of the window that lost most")
    max_ppl_ratio: float | None = Field(
        default=None, gt=0, description="perplexity over the baseline's, of the worst text"
    )
    min_task: dict[str, FiniteFloat] = Field(default={}, description="a task's least score, as {arc_easy: 0.40}")
    max_task_drop: float | None = Field(default=None, ge=0, description="what any task may lose against the baseline")

    @model_validator(mode="after")
    def _any(self) -> Gates:
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

    def failures(self, found: Mapping[str, Any]) -> Iterator[str]:
        """The gates that a model does not pass, in words.

        Args:
            found: `Evaluation.to_json` of a model, with a baseline if that is needed.
        """
        if self.max_kl is not None and not _at_most(found["kl"], self.max_kl):
            yield f"max_kl {self.max_kl:g}: KL is {_number(found['kl'])}"
        for data, score in found["perplexity"].items() if self.max_window_kl is not None else ():
            if not _at_most(score["worst_window_kl"], self.max_window_kl):
                window, lost = score["worst_window"], _number(score["worst_window_kl"])
                yield f"max_window_kl {self.max_window_kl:g}: KL is {lost} in window {window} of {data}"
        for data, score in found["perplexity"].items() if self.max_ppl_ratio is not None else ():
            before = found["baseline"]["perplexity"][data]
            ratio = score["value"] / before if score["value"] is not None and before else None
            if not _at_most(ratio, self.max_ppl_ratio):
                yield f"max_ppl_ratio {self.max_ppl_ratio:g}: the ratio on {data} is {_number(ratio)}"
        for task, least in self.min_task.items():
            result = found["tasks"].get(task)
            if result is None:
                yield f"min_task {task}={least:g}: it has no score"
            elif not _higher_is_better(result):
                yield f"min_task {task}={least:g}: of {result['metric']} lower is better: min_task cannot judge it"
            elif not result["score"] >= least:
                yield f"min_task {task}={least:g}: its score is {_number(result['score'])}"
        for task, result in found["tasks"].items() if self.max_task_drop is not None else ():
            change = result["score"] - result["baseline"]
            drop = -change if _higher_is_better(result) else change
            if not drop <= self.max_task_drop:
                yield f"max_task_drop {self.max_task_drop:g}: {task} lost {_number(drop)}"


class GateError(VerificationError):
    """A model lost more than was allowed."""


def require(gates: Gates | None, found: Sequence[Mapping[str, Any]]) -> None:
    """Raise GateError unless all models pass all gates; every gate that fails is named.

    Args:
        found: as for `Gates.failures`.
    """
    failed = [
        f"{model['model']}: gate {failure}"
        for model in found
        for failure in (() if gates is None else gates.failures(model))
    ]
    if failed:
        raise GateError("\n".join(failed), hint="use more bits, smaller groups or `refine`, or move the gate")


def _higher_is_better(result: Mapping[str, Any]) -> bool:
    return bool(result.get("higher_is_better", True))  # a run from before this was kept has accuracies


def _at_most(value: float | None, bound: float | None) -> bool:
    return value is not None and bound is not None and value <= bound


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"

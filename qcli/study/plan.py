"""What running a study would cost, from the headers of its models, and which of its runs are missing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qcli.quantization.footprint import quantization_placement
from qcli.quantization.plan import make_plan
from qcli.study.content import address_by_content, require_texts
from qcli.study.grid import Study
from qcli.study.rows import read_rows
from qcli.study.study import require_tasks
from qcli.utils.trust import NOTHING, Trust


@dataclass(frozen=True)
class PlannedRun:
    """One run: its values on the axes, the size of its checkpoint, and its cost.

    Attributes:
        bytes: of the checkpoint.
        peak_memory_estimate: bytes while quantizing.
        status: of its row; None: it has none, or will be repeated.
    """

    point: dict[str, Any]
    bits_per_weight: float
    bytes: int
    peak_memory_estimate: int
    status: str | None


@dataclass(frozen=True)
class StudyPlan:
    """The runs of a study; `study` is its file."""

    study: str
    axes: list[str]
    runs: list[PlannedRun]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def plan_study(study: Study, out: Path | None, *, retry: bool, trust: Trust = NOTHING) -> StudyPlan:
    """Check and plan all runs.

    Args:
        out: folder of the rows, which need not exist; None: no run has a row.
        retry: failed runs are missing too.
        trust: code of models and tasks that may run.

    Raises:
        UsageError: a text or a task that a recipe names does not exist, or a recipe does not fit its model.
        StateError: as `read_rows`.
    """
    require_texts(study.runs)
    rows = read_rows(out) if out is not None and out.exists() and any(out.iterdir()) else []
    statuses = {row["address"]: row["status"] for row in rows if row["status"] == "done" or not retry}
    if any(run.recipe.eval and run.recipe.eval.tasks for run in study.runs):  # the check loads torch
        require_tasks(study.runs, trust)
    runs = []
    for run in address_by_content(study.runs, trust) if statuses else study.runs:
        plan = make_plan(run.recipe, trust)
        status = statuses.get(run.address)
        runs.append(PlannedRun(run.point, plan.bits_per_weight, plan.bytes, quantization_placement(plan).peak, status))
    return StudyPlan(study.file, study.axes, runs)

"""Zero-shot and few-shot tasks, through lm-eval's own `HFLM` on the loaded model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcli.errors import UsageError
from qcli.models.source import open_source
from qcli.progress import Progress
from qcli.shards import sha256

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_MAIN = ("acc", "exact_match", "f1")  # the metric that gates and tables look at, in this order; else a task's first


@dataclass(frozen=True)
class TaskResult:
    """What a model reached in one task.

    Attributes:
        metric: the main one.
        score, stderr: its value and standard error.
        metrics: all that the task computes.
        samples: how many questions were asked.
        version: of the task's definition.
    """

    metric: str
    score: float
    stderr: float | None
    metrics: dict[str, float]
    samples: int
    version: str


class Tasks:
    """Tasks by name.

    Args:
        names: of tasks or groups of tasks.
        include_path: folder of more task files.
        limit: ask only the first questions of each task.
        fewshot: examples before each question; None: as the task says.

    Raises:
        UsageError: no such task; the nearest names are offered.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | None = None,
        limit: int | None = None,
        fewshot: int | None = None,
    ) -> None:
        self.names, self.limit, self.fewshot = list(names), limit, fewshot
        if include_path is not None and not Path(include_path).is_dir():
            raise UsageError(f"include_path: {include_path} is not a folder")
        self._manager = _manager(include_path)
        known = self._manager.all_tasks
        for name in self.names:
            if name not in known:
                near = get_close_matches(name, known, n=3)
                raise UsageError(
                    f"task {name!r} does not exist",
                    hint=f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them",
                )

    @property
    def key(self) -> dict[str, Any]:
        """What decides a model's results, besides the model."""
        from importlib.metadata import version

        return {
            "tasks": [_definition(self._manager, name) for name in self.names],
            "limit": self.limit,
            "fewshot": self.fewshot,
            "lm_eval": version("lm_eval"),
        }

    def run(self, model: str, device: torch.device, dtype: torch.dtype, progress: Progress) -> dict[str, TaskResult]:
        """Ask a model, as transformers loads it.

        Raises:
            UsageError: a task's data cannot be loaded.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        progress(f"tasks of {model}", 0, 1)
        loaded, tokenizer = _load(model, device, dtype)
        wrapped = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=8)
        try:
            found = simple_evaluate(
                wrapped,
                tasks=list(self.names),
                num_fewshot=self.fewshot,
                limit=self.limit,
                task_manager=self._manager,
                bootstrap_iters=100,
                log_samples=False,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise UsageError(f"the data of tasks {', '.join(self.names)} cannot be loaded: {error}") from None
        assert found is not None
        progress(f"tasks of {model}", 1, 1)
        return {task: _result(task, found) for task in found["results"] if found["n-samples"].get(task)}


def _manager(include_path: str | None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _definition(manager: TaskManager, name: str) -> list[str]:
    """What defines a task or a group: its file, and data files on this machine."""
    entry = manager.task_index[name]
    data = (entry.cfg or {}).get("dataset_kwargs", {}).get("data_files", {})
    local = [Path(file) for file in (data.values() if isinstance(data, Mapping) else [data]) if isinstance(file, str)]
    files = [file for file in (entry.yaml_path, *local) if file is not None and Path(file).is_file()]
    return [name, *(sha256(Path(file)) for file in files)]


def _load(model: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    import qcli  # noqa: F401  teaches transformers the format

    source = open_source(model)
    auto: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": source.trust_remote_code}
    if source.path.is_file():
        loaded = auto.from_pretrained(source.path.parent, gguf_file=source.path.name, **options)
    else:
        loaded = auto.from_pretrained(source.path, **options)
    return loaded.eval().to(device), source.tokenizer()


def _result(task: str, found: Mapping[str, Any]) -> TaskResult:
    """From lm-eval's `{"acc,none": .., "acc_stderr,none": ..}`."""
    values = {key.partition(",")[0]: value for key, value in found["results"][task].items() if "," in key}
    metrics = {
        name: float(value) for name, value in values.items() if not name.endswith("_stderr") and _is_number(value)
    }
    metric = next((name for name in _MAIN if name in metrics), next(iter(metrics)))
    stderr = values.get(f"{metric}_stderr", math.nan)
    return TaskResult(
        metric=metric,
        score=metrics[metric],
        stderr=float(stderr) if _is_number(stderr) and math.isfinite(stderr) else None,
        metrics=metrics,
        samples=int(found["n-samples"][task]["effective"]),
        version=str(found["versions"].get(task)),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

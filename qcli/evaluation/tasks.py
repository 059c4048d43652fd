"""Zero-shot and few-shot tasks, through lm-eval's own `HFLM` on the loaded model."""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import torch

from qcli.models.open import open_source
from qcli.utils.errors import UsageError
from qcli.utils.files import sha256
from qcli.utils.progress import Progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

_MAIN = ("acc", "exact_match", "f1")  # the metric that gates and tables look at, in this order; else a task's first


@dataclass(frozen=True)
class TaskResult:
    """What a model reached in one task, or in a group of tasks that has a score of its own.

    Attributes:
        metric: the main one; as `exact_match (strict-match)` where lm-eval filters answers in several ways, of which
            the first one counts.
        score, stderr: its value and standard error.
        metrics: all that the task computes.
        samples: how many questions were asked; of a group, in all its tasks.
        version: of the task's definition.
        higher_is_better: whether a greater score is the better one; of perplexities it is not.
    """

    metric: str
    score: float
    stderr: float | None
    metrics: dict[str, float]
    samples: int
    version: str
    higher_is_better: bool


class Tasks:
    """Tasks by name.

    Args:
        names: of tasks or groups of tasks.
        include_path: folder of more task files.
        limit: ask only the first questions of each task.
        fewshot: examples before each question; None: as the task says.

    Raises:
        UsageError: no such task; the nearest names are offered. Or a name is empty.
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
        if "" in self.names:
            raise UsageError("the name of a task is empty", hint="names are parted by single commas: arc_easy,piqa")
        self._manager = _manager(self.names, include_path)
        known = self._manager.all_tasks
        for name in self.names:
            if name not in known:
                near = get_close_matches(name, known, n=3)
                raise UsageError(
                    f"task {name!r} does not exist",
                    hint=f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them",
                )

    def require_scores(self, names: Iterable[str]) -> None:
        """Refuse names that will have no score of their own, before work is spent on their tasks.

        Raises:
            UsageError: a tag, or a group that lm-eval does not aggregate.
        """
        for name in names:
            entry = self._manager.task_index[name]
            single = entry.kind.name in ("TASK", "PY_TASK")
            if not single and not (entry.cfg or {}).get("aggregate_metric_list"):
                raise UsageError(
                    f"{name} is a group of tasks without a score of its own: no gate can judge it",
                    hint="name its tasks, both as tasks and as gates",
                )

    def require_data(self) -> None:
        """Load what will be asked, before work is spent.

        Raises:
            UsageError: as `run`.
        """
        for name in self.names:
            with self._errors(name):
                try:
                    self._manager.load([name])
                except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
                    if self._own_line(name, error):
                        raise
                    problem = f"{type(error).__name__}: {error}"
                    raise UsageError(f"task {name} cannot be loaded: {problem}", hint="-vv shows where") from error

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Tell of errors in what a task brings as the user's; others stay what they are."""
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
        from jinja2 import TemplateError

        try:
            yield
        except (ConnectionError, FileNotFoundError, DatasetsError) as error:
            raise UsageError(f"the data of task {name} cannot be loaded: {error}") from None
        except TemplateError as error:
            raise UsageError(f"a template of task {name} does not fit its data: {error}") from None
        except Exception as error:
            if not (place := self._own_line(name, error)):
                raise
            raise UsageError(f"the code of task {name} fails: {type(error).__name__}: {error} ({place})") from error

    def _own_line(self, name: str, error: Exception) -> str | None:
        """The last line of the task's own code that an error has passed."""
        entries = _members(self._manager.task_index, [name]).values()
        files = {str(file) for entry in entries for file in _code(entry.cfg)}
        own = [frame for frame in extract_tb(error.__traceback__) if frame.filename in files]
        return f"{own[-1].filename}, line {own[-1].lineno}" if own else None

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides a model's results, besides the model."""
        from importlib.metadata import version

        return {
            "tasks": _definition(self._manager.task_index, self.names),
            "limit": self.limit,
            "fewshot": self.fewshot,
            "lm_eval": version("lm_eval"),
        }

    def run(self, model: str, device: torch.device, dtype: torch.dtype, progress: Progress) -> dict[str, TaskResult]:
        """Ask a model, as transformers loads it.

        Raises:
            UsageError: a task's data cannot be loaded, its templates or its code fail on it, or it gives no number.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        names = list(dict.fromkeys(self.names))
        progress(f"tasks of {model}", 0, len(names))
        loaded, tokenizer = _load(model, device, dtype)
        wrapped = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=8)
        results: dict[str, TaskResult] = {}
        for done, name in enumerate(names):  # one by one: lm-eval's errors do not name the task
            with self._errors(name):
                found = simple_evaluate(
                    wrapped,
                    tasks=[name],
                    num_fewshot=self.fewshot,
                    limit=self.limit,
                    task_manager=self._manager,
                    bootstrap_iters=100,
                    log_samples=False,
                )
            assert found is not None
            results |= {task: _result(task, found) for task in found["results"] if _has_score(task, found)}
            progress(f"tasks of {model}", done + 1, len(names))
        return results


def _manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """An index of task files; without lm-eval's own, which take seconds to read, where the user's have all `names`."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return _builtin()
    own = TaskManager(include_path=include_path, include_defaults=False)
    members = _members(own.task_index, names)
    wanted = [*names, *(name for entry in members.values() for name in _named_by(entry))]
    return own if members.keys() >= set(wanted) else TaskManager(include_path=include_path)


@cache
def _builtin() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _definition(index: Mapping[str, Entry], names: Sequence[str]) -> list[Any]:
    """What defines tasks and groups: their files with those that they include, and data files on this machine."""
    entries = _members(index, names)
    configs = [entry.cfg for entry in entries.values() if entry.cfg is not None]  # with what they include
    files = {file for entry in entries.values() for file in _beside(entry)}
    files |= {file for config in configs for file in _code(config)} | set(_data(configs))
    described = [(name, repr(entry.cfg)) for name, entry in sorted(entries.items())]
    return [
        list(names),
        hashlib.sha256(repr(described).encode()).hexdigest(),
        *([file.name, sha256(file)] for file in sorted(files)),
    ]


def _members(index: Mapping[str, Entry], names: Iterable[str]) -> dict[str, Entry]:
    """Entries by name, with all tasks and groups that are in a group or a tag among them."""
    found: dict[str, Entry] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found or name not in index:
            continue
        entry = found[name] = index[name]
        waiting += _named_by(entry)
    return found


def _named_by(entry: Entry) -> Iterable[str]:
    """Names in a group or a tag; in a group also words beside them."""
    if entry.kind.name == "TAG":
        return list(entry.tags)
    return _strings((entry.cfg or {}).get("task")) if entry.kind.name == "GROUP" else ()


def _beside(entry: Entry) -> Iterator[Path]:
    """All files in the folder of a task of the user's own, since its code may read any of them."""
    if entry.yaml_path is not None and not _is_builtin(Path(entry.yaml_path)):
        yield from (file for file in Path(entry.yaml_path).parent.iterdir() if file.is_file())


def _code(config: Mapping[str, Any] | None) -> Iterator[Path]:
    """All modules in the folders of those that `!function` names, which an included file may have elsewhere."""
    for text in _strings(config):
        module, _, function = Path(text).name.rpartition(".")  # the index has !function as /folder/module.function
        if not os.path.isabs(text) or "\n" in text or not function.isidentifier():
            continue
        file = Path(text).parent / f"{module.replace('.', '/')}.py"
        if file.is_file() and not _is_builtin(file):
            yield from file.parent.glob("*.py")


def _data(configs: Iterable[Mapping[str, Any]]) -> Iterator[Path]:
    """Local data files. A group may give its members another folder, so all names are looked for in all folders."""
    named: dict[str, list[str]] = {"dataset_path": [], "data_dir": [], "data_files": []}
    for config in configs:
        _collect(config, named)
    folders = ["", *named["dataset_path"], *named["data_dir"]]
    for folder in dict.fromkeys(folders):
        for name in dict.fromkeys([*named["data_files"], *folders]):
            for match in glob.glob(os.path.join(folder, name), recursive=True) if name else ():
                path = Path(match)
                yield from (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _collect(value: Any, named: dict[str, list[str]]) -> None:
    """Add what `value` has under the keys of `named`, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in named:
                named[key] += _strings(item)
            else:
                _collect(item, named)
    elif isinstance(value, list):
        for item in value:
            _collect(item, named)


def _strings(value: Any) -> Iterator[str]:
    """All strings in YAML's values, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _is_builtin(path: Path) -> bool:
    """Whether lm-eval brings a file, whose version says what is in it."""
    import lm_eval.tasks

    return path.resolve().is_relative_to(Path(lm_eval.tasks.__file__).resolve().parent)


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


def _has_score(task: str, found: Mapping[str, Any]) -> bool:
    """Whether a result is that of a task with questions, or a group's that lm-eval has aggregated."""
    return bool(found["n-samples"].get(task)) or any("," in key for key in found["results"][task])


def _result(task: str, found: Mapping[str, Any]) -> TaskResult:
    """From lm-eval's `{"acc,none": .., "acc_stderr,none": ..}`, where a filter follows the comma."""
    values = {tuple(key.split(",", 1)): value for key, value in found["results"][task].items() if "," in key}
    scores = {
        key: float(value) for key, value in values.items() if not key[0].endswith("_stderr") and _is_number(value)
    }
    if not scores:
        raise UsageError(f"task {task} gives no number")
    several = len({way for _, way in scores}) > 1
    main = next((key for name in _MAIN for key in scores if key[0] == name), next(iter(scores)))
    labels = {(name, way): f"{name} ({way})" if several else name for name, way in scores}
    stderr = values.get((f"{main[0]}_stderr", main[1]), math.nan)
    leaves = list(_leaves(task, found))
    # lm-eval says nothing of a metric that only a task's code gives: accuracies and the like are usual
    directions = [found["higher_is_better"].get(leaf, {}).get(main[0]) for leaf in leaves]
    return TaskResult(
        metric=labels[main],
        score=scores[main],
        stderr=float(stderr) if _is_number(stderr) and math.isfinite(stderr) else None,
        metrics={labels[key]: score for key, score in scores.items()},
        samples=sum(int(found["n-samples"][leaf]["effective"]) for leaf in leaves),
        version=str(found["versions"].get(task)),
        higher_is_better=False not in directions,
    )


def _leaves(task: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The tasks of a group, of groups in it too; a task itself."""
    members = found["group_subtasks"].get(task)
    if members is None:
        yield task
    else:
        for member in members:
            yield from _leaves(member, found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

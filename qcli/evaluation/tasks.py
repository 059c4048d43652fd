"""Zero-shot and few-shot tasks, through lm-eval's own `HFLM` on the loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch

from qcli.data.begin import Bos, begin_tokens
from qcli.data.chats import chat_template
from qcli.evaluation.task_files import code_files, definition, is_own, members, task_manager
from qcli.evaluation.task_model import BATCH_SIZE, hushed, wrapped
from qcli.evaluation.task_results import TaskResult, task_results
from qcli.evaluation.task_sandbox import TRUST, sandboxed
from qcli.models.loadable import auto_class
from qcli.models.pretrained import pretrained
from qcli.models.source import ModelSource, first_line, reported, with_type
from qcli.utils.errors import UsageError
from qcli.utils.progress import Progress, silent

_ADAPTER = "adapter_config.json"
_UNSAFE = "which is marked as unsafe"  # in the error of lm-eval


class Tasks:
    """lm-eval tasks by name.

    Args:
        names: of tasks, groups or tags.
        include_path: folder of more task files.
        limit: use only the first questions of each task.
        fewshot: examples before each question; None: the task's default.
        chat: put questions into the model's chat template.
        batch_size: questions that run together.
        trusted: whether code in task files of `include_path` may run.

    Raises:
        UsageError: a name is empty or unknown; the nearest known names are offered.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: str | None = None,
        limit: int | None = None,
        fewshot: int | None = None,
        *,
        chat: bool = False,
        batch_size: int = BATCH_SIZE,
        trusted: bool = False,
    ) -> None:
        self.names, self.limit, self.fewshot, self.trusted = list(names), limit, fewshot, trusted
        self.chat, self.batch_size = chat, batch_size
        if include_path is not None and not Path(include_path).is_dir():
            raise UsageError(f"include_path: {include_path} is not a folder")
        if "" in self.names:
            raise UsageError("a task name is empty", hint="separate names by single commas: arc_easy,piqa")
        self._manager = task_manager(self.names, include_path)
        known = self._manager.all_tasks
        for name in self.names:
            if name not in known:
                near = get_close_matches(name, known, n=3)
                raise UsageError(
                    f"task {name!r} does not exist",
                    hint=f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them",
                )

    def require_scores(self, names: Iterable[str]) -> None:
        """Check, before anything runs, that gates on these names will have a score.

        Raises:
            UsageError: a tag, or a group that lm-eval does not aggregate.
        """
        for name in names:
            entry = self._manager.task_index[name]
            single = entry.kind.name in ("TASK", "PY_TASK")
            if not single and not (entry.cfg or {}).get("aggregate_metric_list"):
                raise UsageError(
                    f"{name} is a group of tasks without a score of its own: no gate can apply to it",
                    hint="list its tasks instead, both as tasks and as gates",
                )

    def require_chat(self, source: ModelSource) -> None:
        """Check, before anything runs, that a model has a chat template where questions are put into it.

        Raises:
            UsageError: it has none.
        """
        if self.chat and chat_template(source) is None:
            raise UsageError(
                f"{source.path} has no chat template to put questions into", hint="leave out --apply-chat-template"
            )

    def require_data(self) -> None:
        """Load the tasks' data before anything runs.

        Raises:
            UsageError: as `run`.
        """
        for name in self.names:
            with self._errors(name):
                try:
                    self._require_harmless(name)
                except (AttributeError, KeyError, SyntaxError, TypeError, ValueError) as error:
                    if self._own_line(name, error):
                        raise
                    raise UsageError(
                        f"task {name} cannot be loaded: {with_type(error)}", hint="-vv shows where"
                    ) from error

    @cached_property
    def key(self) -> dict[str, Any]:
        """Cache key of a model's results, without the model."""
        from importlib.metadata import version

        return {
            "tasks": definition(self._manager.task_index, self.names),
            "limit": self.limit,
            "fewshot": self.fewshot,
            "chat": self.chat,
            "lm_eval": version("lm_eval"),
        }

    def run(
        self,
        name: str,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        progress: Progress,
        bos: Bos = "auto",
    ) -> dict[str, TaskResult]:
        """Evaluate a model, as transformers loads it.

        Args:
            bos: whether prompts begin with a begin token.

        Raises:
            UsageError: a task's data cannot be loaded, its templates or its code fail on it, or it gives no number; the
                tokenizer has no begin token, and `bos` is true; the model has no chat template, and `chat` is true.
        """
        from lm_eval import simple_evaluate

        self.require_chat(source)
        tasks, stage = list(dict.fromkeys(self.names)), f"tasks of {name}"
        progress(stage, 0, len(tasks))
        with reported(f"{source.path}: transformers cannot load this model"):
            loaded = _load(source, device, dtype)
            model = wrapped(loaded, source, bos, self.batch_size)
        results: dict[str, TaskResult] = {}
        for done, task in enumerate(tasks, start=1):  # one by one: lm-eval's errors do not name the task
            with self._errors(task), self._restrictions(task), hushed(bars=progress is not silent):
                output = simple_evaluate(
                    model,
                    tasks=[task],
                    num_fewshot=self.fewshot,
                    limit=self.limit,
                    apply_chat_template=self.chat,
                    task_manager=self._manager,
                    bootstrap_iters=100,
                    log_samples=False,
                )
            assert output is not None
            results |= task_results(output, bos=bool(begin_tokens(source, bos)), chat=self.chat)
            progress(stage, done, len(tasks))
        return results

    def _restrictions(self, name: str) -> AbstractContextManager[None]:
        """What holds while a task is read and run: nothing where all of it is lm-eval's own, or trusted."""
        own = any(is_own(entry) for entry in members(self._manager.task_index, [name]).values())
        return sandboxed() if own and not self.trusted else nullcontext()

    def _require_harmless(self, name: str) -> None:
        """Load a task with its data, and refuse one that runs what the model writes.

        Raises:
            UsageError: it does.
        """
        with self._restrictions(name), hushed(bars=True):
            loaded = self._manager.load([name])["tasks"]
        for task, loaded_task in loaded.items():
            if getattr(loaded_task, "UNSAFE_CODE", False):
                raise _unsafe(task)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn errors of a task's data, templates and code into UsageError; those of the machine pass."""
        from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
        from jinja2 import TemplateError
        from jinja2.exceptions import SecurityError

        try:
            yield
        except (ConnectionError, FileNotFoundError, DatasetsError) as error:
            reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            raise UsageError(f"the data of task {name} cannot be loaded: {reason}") from None
        except SecurityError as error:
            raise UsageError(
                f"a template of task {name} does what only trusted ones may: {error}", hint=TRUST
            ) from None
        except TemplateError as error:
            raise UsageError(f"a template of task {name} does not fit its data: {error}") from None
        except Exception as error:
            if _UNSAFE in str(error):
                raise _unsafe(name) from None
            if place := self._own_line(name, error):
                raise UsageError(f"the code of task {name} fails: {with_type(error)} ({place})") from error
            with reported(f"task {name} cannot be run", hint="do its fields fit its data? -vv shows where it fails"):
                raise

    def _own_line(self, name: str, error: Exception) -> str | None:
        """The innermost line of the task's own code in an error's traceback."""
        entries = members(self._manager.task_index, [name]).values()
        files = {str(file) for entry in entries for file in code_files(entry.cfg)}
        own = [frame for frame in extract_tb(error.__traceback__) if frame.filename in files]
        return f"{own[-1].filename}, line {own[-1].lineno}" if own else None


def _unsafe(task: str) -> UsageError:
    return UsageError(
        f"task {task} runs code that the model writes, which qcli does not",
        hint="evaluate it with lm_eval, on a machine that may be lost",
    )


def _load(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Any:
    """The whole model, in evaluation mode.

    Raises:
        UsageError: the folder holds an adapter, too, or the model needs code that is not trusted.
    """
    import qcli  # noqa: F401  registers qcli's format with transformers

    trust, config = source.trust_remote_code, source.hf_config()
    if source.path.is_file():
        folder, name = source.path.parent, source.path.name
        loaded = pretrained(  # transformers' own reading of the file drops settings
            auto_class(config), folder, trust_remote_code=trust, dtype=dtype, gguf_file=name, config=config
        )
    else:
        if (source.path / _ADAPTER).exists():
            raise UsageError(
                f"{source.path / _ADAPTER} makes transformers load an adapter, and the model that it names",
                hint="move the adapter to a folder of its own",
            )
        loaded = pretrained(auto_class(config), source.path, trust_remote_code=trust, dtype=dtype, use_safetensors=True)
    return loaded.eval().to(device)

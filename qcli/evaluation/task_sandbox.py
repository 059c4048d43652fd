"""Task files that are not lm-eval's own, without the code they might bring.

In a task file of lm-eval `!function` imports a Python file, a Jinja template can reach any object of the interpreter,
a metric may be a script that is downloaded, and a data set a file that runs code when it is opened. Under `sandboxed`
templates are restricted, and everything else of this kind is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qcli.evaluation.task_files import is_builtin
from qcli.utils.errors import UnsupportedError, UsageError

TRUST = "read the task files; --trust-tasks lets them run code"
_BUILDERS = ("arrow", "csv", "json", "parquet", "text")  # of `datasets`; others open pickles, archives and databases
_SCHEMES = ("file", "hf", "http", "https")  # others, and chains of them, take options that run code


@contextmanager
def sandboxed() -> Iterator[None]:
    """Within: lm-eval reads, loads and runs tasks without code that is not its own.

    Raises:
        UsageError: a task needs such code.
        UnsupportedError: this version of lm-eval cannot be restricted.
    """
    try:
        import datasets  # type: ignore[import-untyped]
        from jinja2.sandbox import SandboxedEnvironment
        from lm_eval import utils
        from lm_eval.api import metrics, registry, task  # noqa: F401  registers the metrics
        from lm_eval.tasks import _yaml_loader as loader

        environment = SandboxedEnvironment(
            loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True
        )
        environment.filters |= utils.env.filters
        known_metrics = registry.metric_registry
        replacements: list[tuple[Any, str, Callable[[Any], Any]]] = [
            (utils, "env", lambda _: environment),
            (loader, "_import_func_in_yml", _own_functions_only),
            (task, "get_metric", lambda get: _known_metrics_only(get, known_metrics)),
            (task, "get_prompt", _own_prompts_only),
            (datasets, "load_dataset", _plain_data_only),
        ]
        with ExitStack() as stack:
            for module, name, restrict in replacements:
                original = getattr(module, name)
                setattr(module, name, restrict(original))
                stack.callback(setattr, module, name, original)
            restore = stack.pop_all()
    except (AttributeError, ImportError) as error:
        raise UnsupportedError(
            f"qcli cannot restrict task files in this version of lm-eval: {error}", hint=TRUST
        ) from error
    with restore:
        yield


def _own_functions_only(load: Callable[[str, Path], Any]) -> Callable[[str, Path], Any]:
    """`!function` in files of lm-eval alone."""

    def restricted(name: str, folder: Path) -> Any:
        if not is_builtin(folder):
            raise UsageError(f"a task file in {folder} runs code: !function {name}", hint=TRUST)
        if any("unsafe_code: true" in file.read_text(encoding="utf-8") for file in folder.glob("*.yaml")):
            raise UsageError(f"!function {name} of {folder} runs code that the model or the data holds", hint=TRUST)
        return load(name, folder)

    return restricted


def _known_metrics_only(get: Callable[..., Any], known: Any) -> Callable[..., Any]:
    """No metrics that are scripts of their own."""

    def restricted(name: str, hf_evaluate_metric: bool = False) -> Any:
        if hf_evaluate_metric or name not in known:
            raise UsageError(f"lm-eval has no metric {name!r} of its own, and others are code", hint=TRUST)
        return get(name, hf_evaluate_metric)

    return restricted


def _own_prompts_only(get: Callable[..., Any]) -> Callable[..., Any]:
    """No prompts of promptsource, whose templates are not restricted."""

    def restricted(prompt: str, *names: Any) -> Any:
        if prompt.startswith("promptsource"):
            raise UsageError(f"the templates of {prompt} are not restricted", hint=TRUST)
        return get(prompt, *names)

    return restricted


def _plain_data_only(load: Callable[..., Any]) -> Callable[..., Any]:
    """Data sets of the hub, which hold no code, and files of kinds that hold none."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as builders  # type: ignore[import-untyped]

    def restricted(path: str, name: str | None = None, **options: Any) -> Any:
        if path in builders and path not in _BUILDERS:
            raise UsageError(f"data of kind {path!r} may run code when it is opened", hint=TRUST)
        for option in ("storage_options", "download_config"):
            if option in options:
                raise UsageError(f"dataset_kwargs: {option} may run code", hint=TRUST)
        places = [path, *_texts([options.get("data_files"), options.get("data_dir")])]
        for place in places:
            if "::" in place or _scheme(place) not in (None, *_SCHEMES):
                raise UsageError(f"data at {place!r} may run code when it is opened", hint=TRUST)
        return load(path=path, name=name, **options)

    return restricted


def _scheme(place: str) -> str | None:
    match = re.match(r"([A-Za-z][\w+.-]*)://", place)
    return match and match[1].lower()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

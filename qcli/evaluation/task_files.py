"""The files that define lm-eval tasks: which tasks a name stands for, and what their results depend on."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.models.source import reported
from qcli.utils.errors import UsageError
from qcli.utils.files import files_below, read_regular, require_regular, sha256

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

_DEPTH = 100  # of a task file


def task_manager(names: Sequence[str], include_path: str | None) -> TaskManager:
    """lm-eval's index of task files. Its own, which take seconds to read, are left out if `include_path` has all
    that `names` need.

    Raises:
        UsageError: lm-eval cannot read `include_path`, or would not return from reading a file of it.
    """
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return _builtin()
    for file in files_below(Path(include_path)):
        if file.suffix == ".yaml":
            _require_shallow(file)
    with reported(f"{include_path}: lm-eval cannot read its task files"):
        own = TaskManager(include_path=include_path, include_defaults=False)
        entries = members(own.task_index, names)
        needed = [*names, *(name for entry in entries.values() for name in _named_by(entry))]
        return own if entries.keys() >= set(needed) else TaskManager(include_path=include_path)


def _require_shallow(file: Path) -> None:
    """Refuse a FIFO, and YAML nested so deeply that the reader, which calls itself, would crash."""
    import yaml  # type: ignore[import-untyped]

    content, depth = read_regular(file), 0
    with contextlib.suppress(yaml.YAMLError, ValueError):  # reported where the task is loaded
        for event in yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            opens = isinstance(event, yaml.CollectionStartEvent)
            depth += opens - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEPTH:
                raise UsageError(f"{file}: nested more than {_DEPTH} levels deep", hint="is this a task file?")


@cache
def _builtin() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def definition(index: Mapping[str, Entry], names: Sequence[str]) -> list[Any]:
    """What defines tasks and groups, as plain data: their configs, and hashes of the code and data files they use."""
    entries = members(index, names)
    configs = [entry.cfg for entry in entries.values() if entry.cfg is not None]  # with what they include
    files = {file for entry in entries.values() for file in _siblings(entry)}
    files |= {file for config in configs for file in code_files(config)} | set(_data_files(configs))
    for file in files:
        require_regular(file)
    described = [(name, repr(entry.cfg)) for name, entry in sorted(entries.items())]
    return [
        list(names),
        hashlib.sha256(repr(described).encode()).hexdigest(),
        *([file.name, sha256(file)] for file in sorted(files)),
    ]


def members(index: Mapping[str, Entry], names: Iterable[str]) -> dict[str, Entry]:
    """Index entries by name, with those of all tasks and groups inside the groups and tags among `names`."""
    entries: dict[str, Entry] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in entries or name not in index:
            continue
        entry = entries[name] = index[name]
        pending += _named_by(entry)
    return entries


def _named_by(entry: Entry) -> Iterable[str]:
    """Names in a group or a tag; for a group also other strings of its task list."""
    if entry.kind.name == "TAG":
        return list(entry.tags)
    return _strings((entry.cfg or {}).get("task")) if entry.kind.name == "GROUP" else ()


def _siblings(entry: Entry) -> Iterator[Path]:
    """All files in the folder of a user's task, since its code may read any of them."""
    if entry.yaml_path is not None and is_own(entry):
        yield from (file for file in Path(entry.yaml_path).parent.iterdir() if file.is_file())


def is_own(entry: Entry) -> bool:
    """Whether a user's file defines the entry."""
    return entry.yaml_path is not None and not is_builtin(Path(entry.yaml_path))


def code_files(config: Mapping[str, Any] | None) -> Iterator[Path]:
    """All modules beside those that `!function` names; an included file may have them in another folder."""
    for text in _strings(config):
        module, _, function = Path(text).name.rpartition(".")  # the index has !function as /folder/module.function
        if not os.path.isabs(text) or "\n" in text or not function.isidentifier():
            continue
        file = Path(text).parent / f"{module.replace('.', '/')}.py"
        if file.is_file() and not is_builtin(file):
            yield from file.parent.glob("*.py")


def _data_files(configs: Iterable[Mapping[str, Any]]) -> Iterator[Path]:
    """Local data files. A group can override its members' folder, so every name is looked up in every folder."""
    named: dict[str, list[str]] = {"dataset_path": [], "data_dir": [], "data_files": []}
    for config in configs:
        _collect(config, named)
    folders = ["", *named["dataset_path"], *named["data_dir"]]
    for folder in dict.fromkeys(folders):
        for name in dict.fromkeys([*named["data_files"], *folders]):
            for match in glob.glob(os.path.join(folder, name), recursive=True) if name else ():
                path = Path(match)
                yield from (file for file in files_below(path) if file.is_file()) if path.is_dir() else [path]


def _collect(value: Any, named: dict[str, list[str]]) -> None:
    """Add the strings that `value` has under the keys of `named`, at any depth."""
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
    """All strings among YAML values, keys not included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def is_builtin(path: Path) -> bool:
    """Whether a file is part of lm-eval, whose version identifies its content."""
    import lm_eval.tasks

    return path.resolve().is_relative_to(Path(lm_eval.tasks.__file__).resolve().parent)

"""Rows of data sets on the hub, through `datasets`. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qcli.data.names import NO_HUB
from qcli.data.rows import Row, RowFile
from qcli.data.source import TextSource
from qcli.utils.errors import UsageError

FOR_CALIBRATION = ("train",)
FOR_EVALUATION = ("test", "validation")  # the first that there is


def open_hub_rows(source: TextSource, *, calibration: bool) -> RowFile:
    """The rows of a data set, without those whose columns are all empty, which public sets have.

    Args:
        calibration: which part to read where the source names none.

    Raises:
        UsageError: no such data set or part, no network, or the data set needs a configuration.
    """
    splits = (source.split,) if source.split else FOR_CALIBRATION if calibration else FOR_EVALUATION
    table = _load(source, splits)

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        names = [name for name in table.column_names if name in wanted]
        for number, values in enumerate(table.select_columns(names)):
            if any(not isinstance(value, str) or value.strip() for value in values.values()):
                yield Row(f"{source.path}: row {number}", values)

    return RowFile(Path(source.path), tuple(table.column_names), rows)


def _load(source: TextSource, splits: Sequence[str]) -> Any:
    import datasets  # type: ignore[import-untyped]

    problem: Exception
    for split in splits:
        try:
            return datasets.load_dataset(source.path, source.config, split=split)
        except ValueError as error:
            problem = error
            if not str(error).startswith("Unknown split") or split == splits[-1]:
                break
        except Exception as error:  # hub, network, cache and disk each raise their own kinds
            problem = error
            break
    reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
    hint = NO_HUB
    if reason.startswith("Unknown split"):
        hint = f"name one: data: {{path: {source.path}, split: ...}}"
    elif reason.startswith("Config name is missing"):
        hint = f"name one: data: {{path: {source.path}, config: ...}}"
    raise UsageError(f"data set {source.path!r} could not be loaded: {reason}", hint=hint) from problem

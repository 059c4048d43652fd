"""Where text comes from: public data sets and files. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from qcli.data.named_set import NamedSet
from qcli.utils import registry
from qcli.utils.errors import UsageError

SELF = "self"  # sampled from the model
_SETS = "qcli.data.sets"
LOCAL = "give a local .txt, .jsonl or .parquet file, or `self` for text sampled from the model"


def set_names() -> list[str]:
    """Names of the data sets in `sets/`; imports none of them."""
    return registry.names(_SETS)


def is_named(data: str) -> bool:
    """Whether `data` is the name of a data set in `sets/`."""
    return data in set_names()


def require_text(data: str) -> None:
    """Raise UsageError unless `data` names a data set, `self`, a folder or a file of text; nothing is read."""
    if not is_named(data) and data != SELF and not is_folder(data):
        _require_file(data)


def is_folder(data: str) -> bool:
    """Whether `data` means a folder of `qcli calibrate`."""
    return not is_named(data) and data != SELF and Path(data).is_dir()


def read_text(data: str, *, calibration: bool) -> str:
    """The text of a named set or a file; rows and documents joined.

    Raises:
        UsageError: no such data, or no text in it.
    """
    if is_named(data):
        text = _read_named(data, calibration=calibration)
    else:
        _require_file(data)
        text = _readers()[Path(data).suffix](Path(data))
    if not text.strip():
        raise UsageError(f"{data}: holds no text", hint=LOCAL)
    return text


def _require_file(data: str) -> None:
    path = Path(data)
    if not path.is_file():
        raise _not_found(data)
    if path.suffix not in _readers():
        raise UsageError(f"{data}: unknown kind of file {path.suffix!r}", hint=LOCAL)


def _readers() -> dict[str, Callable[[Path], str]]:
    return {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _not_found(data: str) -> UsageError:
    if Path(data).suffix or Path(data).name != data:
        return UsageError(f"{data}: no such file", hint=LOCAL)
    known = [*set_names(), SELF]
    near = get_close_matches(data, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown data set {data!r}", hint=f"{guess}known: {', '.join(known)}; or a file")


def _read_named(name: str, *, calibration: bool) -> str:
    import datasets  # type: ignore[import-untyped]

    named: NamedSet = registry.load(_SETS, name)
    split = named.calibration if calibration else named.evaluation
    try:
        rows = datasets.load_dataset(named.path, split=split, **named.load)
    except Exception as error:  # hub, network, cache and disk each raise their own kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"data set {name!r} could not be loaded: {reason}", hint=LOCAL) from error
    return named.separator.join(rows[named.column])


def _read_txt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from None


def _read_jsonl(path: Path) -> str:
    documents = []
    for number, line in enumerate(_read_txt(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}:{number}: not JSON: {error.msg}", hint="a .jsonl file holds one JSON object per line"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UsageError(f"{path}:{number}: no field 'text'", hint='every line must look like {"text": "..."}')
        try:
            record["text"].encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{path}:{number}: 'text' holds half a character (a lone surrogate)", hint="remove the line"
            ) from None
        documents.append(record["text"])
    return "\n\n".join(documents)


def _read_parquet(path: Path) -> str:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        columns = pyarrow.parquet.read_schema(path).names
        if "text" not in columns:
            raise UsageError(f"{path}: no column 'text'", hint=f"its columns: {', '.join(columns) or 'none'}")
        documents = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a readable parquet file: {reason}", hint=LOCAL) from None
    for row, document in enumerate(documents):
        if not isinstance(document, str):
            raise UsageError(f"{path}: row {row}: 'text' holds no text", hint="remove such rows")
    return "\n\n".join(documents)

"""Text from local files: .txt as it is, .jsonl and .parquet as documents joined by an empty line. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from qcli.utils.errors import UsageError

HINT = "give a local .txt, .jsonl or .parquet file, or `self` for text sampled from the model"


def require_file(data: str) -> None:
    """Raise UsageError unless `data` is a file of a known kind; nothing is read."""
    path = Path(data)
    if not path.is_file():
        raise UsageError(f"{data}: no such file", hint=HINT)
    if path.suffix not in _READERS:
        raise UsageError(f"{data}: unknown kind of file {path.suffix!r}", hint=HINT)


def read_file(data: str) -> str:
    """The text of a file.

    Raises:
        UsageError: no such file, of an unknown kind, or not readable.
    """
    require_file(data)
    return _READERS[Path(data).suffix](Path(data))


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
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply, or a huge number"
            raise UsageError(
                f"{path}:{number}: not JSON: {reason}", hint="a .jsonl file has one JSON object per line"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UsageError(f"{path}:{number}: no field 'text'", hint='every line must look like {"text": "..."}')
        try:
            record["text"].encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{path}:{number}: 'text' contains half a character (a lone surrogate)", hint="remove the line"
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
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # damage leads to each of them
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{path}: not a readable parquet file: {reason}", hint=HINT) from None
    for row, document in enumerate(documents):
        if not isinstance(document, str):
            raise UsageError(f"{path}: row {row}: 'text' contains no text", hint="remove such rows")
    return "\n\n".join(documents)


_READERS: dict[str, Callable[[Path], str]] = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}

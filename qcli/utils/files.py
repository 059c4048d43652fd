"""Files that are complete or absent: atomic writes, hashes, and what a full disk means."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qcli.utils.errors import ResourceError, UsageError


def write_json(file: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_bytes(file, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(file: Path) -> Any:
    """The value in a UTF-8 JSON file."""
    return json.loads(file.read_bytes())


def parse_json(content: bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of JSON that someone else wrote.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, or a string has half a character (a lone surrogate), which
            neither files nor tokenizers take.
    """
    try:
        value = json.loads(content.decode(), object_pairs_hook=object_pairs_hook)
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a string has half a character (a lone surrogate)") from None
    return value


def read_regular(file: Path) -> bytes:
    """Content of a file that someone else wrote.

    Raises:
        UsageError: a FIFO, socket or device, which need not have an end.
        OSError: the file is missing or cannot be read.
    """
    require_regular(file)
    return file.read_bytes()


def require_regular(file: Path) -> None:
    """Raise UsageError for a FIFO, socket or device; links to files, folders and missing files pass."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UsageError(f"{file} is not a regular file", hint="copy its content into one")


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically.

    Raises:
        ResourceError: the disk is full.
    """
    write_chunks(file, [content])


def write_chunks(file: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file atomically: after a crash it is complete and on disk, or its previous version is untouched.

    Raises:
        ResourceError: the disk is full.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_problem(file, error) from None
    sync_folder(file.parent)


def sync_file(file: Path) -> None:
    """Flush a file written by someone else to disk."""
    with file.open("r+b" if sys.platform == "win32" else "rb") as stream:  # Windows syncs only what it may write
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk. Windows opens no folders; there NTFS journals renames by itself."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, out: Path) -> None:
    """Rename a finished folder to its final name: readers see all of it or nothing."""
    sync_folder(partial)
    partial.rename(out)
    sync_folder(out.parent)


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(path: Path) -> str | None:
    """SHA-256 of a file, or of the names and contents of all files in a folder; None if `path` is neither."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file())
    entries = [[file.relative_to(path).as_posix(), sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def disk_problem(file: Path, error: OSError) -> ResourceError:
    """The error to raise for a failed write."""
    return ResourceError(
        f"{file} cannot be written: {error.strerror}",
        hint="free some space and run the same command again: finished blocks are kept",
    )


def require_space(folder: Path, needed: int) -> None:
    """Raise ResourceError unless `needed` bytes are free on the disk that will hold `folder`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"{folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free",
            hint="free some space, or choose another --out",
        )

"""Files that are complete or absent: atomic writes, copies, hashes, and errors of the operating system."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qcli.utils.errors import ResourceError, StateError, UsageError, os_problem, warn

_CHUNK = 1 << 24  # bytes of a copy in memory


def write_json(file: Path, value: Any) -> None:
    """Write indented UTF-8 JSON atomically."""
    write_bytes(file, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The content of a file of `write_json`."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(file: Path) -> Any:
    """The value in a UTF-8 JSON file.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    return parse_json(file.read_bytes())


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
        QcliError: it cannot be written; see `os_problem`.
    """
    write_chunks(file, [content])


def write_chunks(file: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file atomically: after a crash it is complete and on disk, or its previous version is untouched.

    Raises:
        QcliError: it cannot be written; see `os_problem`.
    """
    partial = file.with_name(f".{file.name}.partial")
    with _no_remainder(partial), writing(file):
        with partial.open("wb") as stream:
            for chunk in chunks:
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
        sync_folder(file.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file; on return it is on disk.

    Raises:
        QcliError: one of them cannot be read or written; see `os_problem`.
    """
    with reading(source):
        stream = source.open("rb")
    with stream, writing(target), target.open("wb") as copy:
        while chunk := read_chunk(stream, source, _CHUNK):
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())


def read_chunk(stream: Any, source: Path, count: int) -> bytes:
    """At most `count` bytes of an open file.

    Raises:
        QcliError: it cannot be read; see `os_problem`.
    """
    with reading(source):
        data: bytes = stream.read(count)
    return data


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn errors of the operating system in the body into QcliErrors that name `file`; refuse FIFOs and devices."""
    require_regular(file)
    try:
        yield
    except OSError as error:
        raise os_problem(error, f"{file} cannot be written") from error


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn errors of the operating system in the body into QcliErrors that name `file`; refuse FIFOs and devices."""
    require_regular(file)
    try:
        yield
    except OSError as error:
        raise os_problem(error, f"{file} cannot be read") from error


@contextlib.contextmanager
def _no_remainder(partial: Path) -> Iterator[None]:
    """Remove a half-written file if the body fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync_file(file: Path) -> None:
    """Flush a file written by someone else to disk.

    Raises:
        QcliError: it cannot be written; see `os_problem`.
    """
    mode = "r+b" if sys.platform == "win32" else "rb"  # Windows syncs only what it may write
    with writing(file), file.open(mode) as stream:
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


def is_empty_folder(path: Path) -> bool:
    """Whether there is a folder, and nothing in it."""
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def publish(partial: Path, out: Path) -> None:
    """Rename a finished folder to its final name, which an empty folder may have: readers see all of it or nothing.

    Raises:
        StateError: something else has created `out`.
        QcliError: it cannot be written; see `os_problem`.
    """
    with writing(out):
        sync_folder(partial)
        if is_empty_folder(out):
            out.rmdir()
        if os.path.lexists(out):
            raise StateError(f"{out} has been created by something else", hint="move it away and try again")
        partial.rename(out)
    with warned(f"{out} is complete, but may not survive a power failure"):
        sync_folder(out.parent)


@contextlib.contextmanager
def warned(message: str) -> Iterator[None]:
    """Turn errors of the operating system in the body into warnings."""
    try:
        yield
    except OSError as error:
        warn(f"{message}: {error.strerror or error}")


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to), or a folder with all that is in it.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def files_below(folder: Path) -> list[Path]:
    """Everything in a folder and its subfolders that is not a folder, sorted; links to folders are not followed.

    Raises:
        QcliError: a folder cannot be listed, where `Path.rglob` would leave it out; see `os_problem`.
    """

    def fail(error: OSError) -> None:
        raise os_problem(error, f"{error.filename or folder} cannot be read") from error

    walked = os.walk(folder, onerror=fail)
    return sorted(Path(inner) / name for inner, _, names in walked for name in names)


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with reading(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(path: Path) -> str | None:
    """SHA-256 of a file, or of the names and contents of all files in a folder; None if `path` is neither."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        return None
    files = [file for file in files_below(path) if file.is_file()]
    entries = [[file.relative_to(path).as_posix(), sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Raise ResourceError unless `needed` bytes are free on the disk that will hold `folder`."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"{folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free",
            hint="free some space, or choose another --out",
        )

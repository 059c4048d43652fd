"""A cache of results on disk, keyed by everything they depend on."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qcli.utils import sealed
from qcli.utils.errors import QcliError, StateError, warn
from qcli.utils.files import remove, writing
from qcli.utils.owned_folder import FolderKind, mark, refuse_foreign
from qcli.utils.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_LIMIT = 8 << 30  # bytes; the least recently used files are evicted
_VERSION = 2  # of the files; 1 had no checksums
_NAME = re.compile(r"\.?[0-9a-f]{64}(-\d+)?\.(safetensors|json)(\.partial)?")
_KIND = FolderKind("cache")


def default_folder() -> Path:
    """`$QCLI_CACHE`, else `qcli` in the user's cache folder."""
    if folder := os.environ.get("QCLI_CACHE"):
        return Path(expanded(folder))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcli"


def subfolder(name: str) -> Path:
    """A folder inside the default one for files that are no results; created if it does not exist.

    Raises:
        QcliError: it cannot be created, or the default folder contains files that are not of a cache.
    """
    folder = default_folder()
    _refuse_foreign(folder)
    mark(folder, _KIND)
    with writing(folder):
        (folder / name).mkdir(exist_ok=True)
    return folder / name


class Cache:
    """Files named by the hash of their keys. Damaged results are computed again, with a warning.

    Args:
        folder: created with the first result; None disables the cache.

    Raises:
        StateError: the folder contains files that are not of a cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            _refuse_foreign(folder)

    def tensors(
        self,
        key: Mapping[str, Any],
        make: Callable[[], dict[str, Tensor]],
        fits: Callable[[dict[str, Tensor]], bool] = lambda _: True,
    ) -> dict[str, Tensor]:
        """The cached tensors of `key`, else what `make` returns.

        Args:
            fits: whether cached tensors have the expected names and shapes.
        """
        file = self._file(key, "safetensors")
        cached = _loaded(file, sealed.load_tensors)
        if cached is not None:
            if fits(cached):
                return cached
            warn(f"{file}: its tensors have unexpected shapes: recomputing them")
        made = make()
        if file is not None and sum(tensor.nbytes for tensor in made.values()) <= _LIMIT:
            self._keep(file, lambda partial: sealed.write_tensors(partial, made, name=file.name))
        return made

    def values(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The cached plain data of `key`, else what `make` returns."""
        file = self._file(key, "json")
        cached = _loaded(file, lambda file: [sealed.load_json(file)])  # the data may be None
        if cached is not None:
            return cached[0]
        made = make()
        if file is not None:
            self._keep(file, lambda partial: sealed.write_json(partial, made, name=file.name))
        return made

    def _file(self, key: Mapping[str, Any], suffix: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{sealed.digest([_VERSION, key])}.{suffix}"

    def _keep(self, file: Path, write: Callable[[Path], None]) -> None:
        """Write a file under a name of this process alone, then rename it: others may write the same result."""
        partial = file.with_name(f"{file.stem}-{os.getpid()}{file.suffix}")
        with contextlib.suppress(QcliError, OSError):  # a full disk or a read-only home only costs time
            mark(file.parent, _KIND)
            try:
                write(partial)
                partial.replace(file)
            except BaseException:
                with contextlib.suppress(OSError):
                    remove(partial)
                raise
            _prune(file)


def _loaded(file: Path | None, load: Callable[[Path], T]) -> T | None:
    """The content of a cache file; None if there is none, or, with a warning, if it is damaged."""
    if file is None:
        return None
    try:
        if not file.exists():
            return None
        content = load(file)
    except (QcliError, OSError, sealed.Damaged) as problem:
        warn(f"{problem}: recomputing it")
        return None
    with contextlib.suppress(OSError):  # a read-only cache
        os.utime(file)
    return content


def _refuse_foreign(folder: Path) -> None:
    """Raise StateError unless the folder is a cache, new or empty. Caches of earlier versions have no marker."""
    with contextlib.suppress(OSError):  # nothing is evicted from a folder that cannot be read
        folder = folder.resolve()  # a link here is the user's choice
        if folder.is_dir() and all(_NAME.fullmatch(entry.name) for entry in folder.iterdir()):
            return
    try:
        refuse_foreign(folder, _KIND)
    except StateError as problem:
        raise StateError(
            f"the cache cannot be used: {problem.message}", hint="set QCLI_CACHE to an empty or new folder"
        ) from None
    except QcliError:  # an unusable folder only costs time
        return


def _prune(newest: Path) -> None:
    files = [entry for entry in newest.parent.iterdir() if _NAME.fullmatch(entry.name) and entry.is_file()]
    size = sum(file.stat().st_size for file in files)
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        if size <= _LIMIT or file == newest:
            return
        size -= file.stat().st_size
        file.unlink(missing_ok=True)

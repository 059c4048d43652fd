"""A cache of results on disk, keyed by everything they depend on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.utils import shards
from qcli.utils.files import read_json, write_json
from qcli.utils.paths import expanded

if TYPE_CHECKING:
    from torch import Tensor

_LIMIT = 8 << 30  # bytes; the least recently used files are evicted


def default_folder() -> Path:
    """`$QCLI_CACHE`, else `qcli` in the user's cache folder."""
    if folder := os.environ.get("QCLI_CACHE"):
        return Path(expanded(folder))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qcli"


class Cache:
    """Files named by the hash of their keys. Results that cannot be read are computed again.

    Args:
        folder: created with the first result; None disables the cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def tensors(self, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The cached tensors of `key`, else what `make` returns."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(key, "safetensors")
        if file is not None and file.exists():
            with contextlib.suppress(SafetensorError, OSError):
                cached = load_file(file)
                os.utime(file)
                return cached
        made = make()
        if file is not None and sum(tensor.nbytes for tensor in made.values()) <= _LIMIT:
            self._keep(file, lambda: shards.write_tensors(file, made))
        return made

    def values(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The cached plain data of `key`, else what `make` returns."""
        file = self._file(key, "json")
        if file is not None and file.exists():
            with contextlib.suppress(ValueError, OSError):
                cached = read_json(file)
                os.utime(file)
                return cached
        made = make()
        if file is not None:
            self._keep(file, lambda: write_json(file, made))
        return made

    def _file(self, key: Mapping[str, Any], suffix: str) -> Path | None:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return None if self.folder is None else self.folder / f"{name}.{suffix}"

    def _keep(self, file: Path, write: Callable[[], None]) -> None:
        from qcli.utils.errors import ResourceError

        with contextlib.suppress(ResourceError, OSError):  # a full disk or a read-only home only costs time
            file.parent.mkdir(parents=True, exist_ok=True)
            write()
            self._prune(file)

    def _prune(self, newest: Path) -> None:
        files = sorted((each for each in newest.parent.iterdir() if each.is_file()), key=lambda f: f.stat().st_mtime)
        size = sum(file.stat().st_size for file in files)
        for file in files:
            if size <= _LIMIT or file == newest:
                return
            size -= file.stat().st_size
            file.unlink(missing_ok=True)

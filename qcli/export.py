"""What a layout has to do: the base class of `exports/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from qcli.models.native import NativeSource
from qcli.progress import Progress


class Export:
    """Writes a qcli checkpoint in one layout."""

    name: ClassVar[str]

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        """Write the weights into `folder`, in files of at most `shard_size` bytes of tensors."""
        raise NotImplementedError

    def config(self, source: NativeSource) -> dict[str, Any]:
        """The result's `config.json`."""
        raise NotImplementedError

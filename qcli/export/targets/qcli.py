"""The native layout, in files of another size: tensors are copied byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from qcli.export.target import ExportTarget
from qcli.models.native import LOADING, NativeSource
from qcli.utils import shards
from qcli.utils.files import write_json
from qcli.utils.progress import Progress

__all__ = ["Native"]


class Native(ExportTarget):
    """`quant_method: qcli`."""

    name: ClassVar[str] = "qcli"
    ragged_groups: ClassVar[bool] = True
    loading: ClassVar[str] = LOADING

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        progress("write", 0, 1)
        shards.join(source.parts_to_write(), folder, shard_size)
        write_json(folder / "config.json", source.config_to_write())
        source.copy_companions(folder)
        progress("write", 1, 1)

"""The records of data sets: what a file of `sets/` exports. No torch, and no `datasets` before one is read."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcli.utils.errors import UsageError


@dataclass(frozen=True)
class NamedSet:
    """A public data set: where it is, which parts are used, and how its rows become one text.

    Attributes:
        path: hub id, or name of a loader such as `text`, for `datasets.load_dataset`.
        load: its further arguments.
        column: the column with the text.
        separator: stands between two rows.
        calibration: the slice for calibration, in the notation of `datasets`.
        evaluation: the slice for evaluation.
    """

    path: str
    column: str
    separator: str
    calibration: str
    evaluation: str
    load: Mapping[str, Any] = field(default_factory=dict)

    def read(self, *, calibration: bool) -> str:
        """The text for calibration, or the one for evaluation.

        Raises:
            UsageError: it cannot be loaded.
        """
        import datasets  # type: ignore[import-untyped]

        try:
            rows = datasets.load_dataset(
                self.path, split=self.calibration if calibration else self.evaluation, **self.load
            )
        except Exception as error:  # hub, network, cache and disk each raise their own kinds
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UsageError(f"could not be loaded: {reason}") from error
        return self.separator.join(rows[self.column])


@dataclass(frozen=True)
class PackagedText:
    """A text that comes with qcli, its parts in one `.txt.xz` file each."""

    calibration: Path
    evaluation: Path

    def read(self, *, calibration: bool) -> str:
        """The text for calibration, or the one for evaluation.

        Raises:
            UsageError: the installation is damaged.
        """
        file = self.calibration if calibration else self.evaluation
        try:
            return lzma.decompress(file.read_bytes()).decode()
        except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
            raise UsageError(f"could not be read: {file}: {error}") from error

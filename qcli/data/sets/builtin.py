"""English text in the public domain that comes with qcli; `qcli/data/builtin/README.md` says where it is from."""

from __future__ import annotations

from pathlib import Path

from qcli.data.named_set import PackagedText

__all__ = ["BUILTIN"]

_FOLDER = Path(__file__).parents[1] / "builtin"
BUILTIN = PackagedText(_FOLDER / "calibration.txt.xz", _FOLDER / "evaluation.txt.xz")

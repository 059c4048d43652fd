"""Lines about products of small numbers, in a file beside this one."""

from __future__ import annotations

from pathlib import Path

from qcli.data.named_set import NamedSet

__all__ = ["PRODUCTS"]

_FOLDER = Path(__file__).parent
PRODUCTS = NamedSet(
    path="text",
    load={"data_files": {"train": str(_FOLDER / "products.txt")}, "cache_dir": str(_FOLDER / "cache")},
    column="text",
    separator="\n",
    calibration="train[:80%]",
    evaluation="train[80%:]",
)

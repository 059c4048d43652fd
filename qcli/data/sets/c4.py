"""C4: English web pages; the first documents of one file for each split."""

from __future__ import annotations

from qcli.data.named_set import NamedSet

__all__ = ["C4"]

C4 = NamedSet(
    path="allenai/c4",
    load={
        "data_files": {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        }
    },
    column="text",
    separator=" ",
    calibration="train[:10000]",
    evaluation="validation[:1100]",
)

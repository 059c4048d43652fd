"""Penn Treebank: newspaper sentences, with rare words replaced by `<unk>`."""

from __future__ import annotations

from qcli.data.named_set import NamedSet

__all__ = ["PTB"]

PTB = NamedSet(
    path="ptb-text-only/ptb_text_only",
    load={"name": "penn_treebank", "revision": "refs/convert/parquet"},
    column="sentence",
    separator=" ",
    calibration="train",
    evaluation="test",
)

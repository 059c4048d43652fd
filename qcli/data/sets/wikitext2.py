"""WikiText-2 (raw): articles of Wikipedia."""

from __future__ import annotations

from qcli.data.named_set import NamedSet

__all__ = ["WIKITEXT2"]

WIKITEXT2 = NamedSet(
    path="Salesforce/wikitext",
    load={"name": "wikitext-2-raw-v1"},
    column="text",
    separator="\n\n",
    calibration="train",
    evaluation="test",
)

"""`auto-round`: integers in the layouts of `gptq` or `awq`, of which `packing_format` names one (AutoRound)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from qcli.models.encoding import Decoded, Encoding
from qcli.models.encodings.awq import AWQ
from qcli.models.encodings.gptq import GPTQ
from qcli.utils.safetensors import Extent

__all__ = ["AutoRound"]

_GPTQ = {  # by packing format: only the first two store zero points minus one
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
}
_AWQ = ("auto_round:auto_awq", "auto_round:awq")


class AutoRound(Encoding):
    """Layers of AutoRound."""

    method: ClassVar[str] = "auto-round"

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        super().__init__(config, dtype)
        layout = config.get("packing_format", "auto_round:auto_gptq")
        self._layout: Encoding
        if layout in _AWQ:
            self._layout = AWQ({**config, "version": "gemm"}, dtype)
        elif layout in _GPTQ and config.get("data_type", "int") == "int":
            self._layout = GPTQ({**config, "checkpoint_format": _GPTQ[layout]}, dtype)
        else:
            raise self.unread(
                f"packing_format {layout!r} of {config.get('data_type', 'int')!r}",
                f"integers in {', '.join([*_GPTQ, *_AWQ])}",
            )

    @property
    def description(self) -> str:
        return f"auto-round in the layout of {self._layout.description}"

    def weights(self, stored: Mapping[str, Extent]) -> Iterator[tuple[str, Decoded, list[str]]]:
        yield from self._layout.weights(stored)

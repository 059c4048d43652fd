"""A qcli checkpoint as a source."""

from __future__ import annotations

from typing import Any

from qcli.models.manifest import Layout
from qcli.models.packed import PackedSource


class NativeSource(PackedSource):
    """A folder that `qcli quantize` wrote, or `qcli pack` in its own layout."""

    def _storage_config(self, config: dict[str, Any]) -> Layout:
        return Layout(config)

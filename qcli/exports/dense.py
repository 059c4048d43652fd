"""Decoded weights in the model's own dtype: loads anywhere, as large as the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from qcli import shards
from qcli.errors import UnsupportedError
from qcli.export import Export
from qcli.models.headers import read_header
from qcli.models.native import NativeSource
from qcli.progress import Progress

__all__ = ["Dense"]


class Dense(Export):
    """An unquantized model whose weights are those that the codes stand for.

    Raises:
        UnsupportedError: the checkpoint quantizes activations or norms outputs, which an ordinary model cannot do.
    """

    name: ClassVar[str] = "dense"

    def write(self, source: NativeSource, folder: Path, shard_size: int, progress: Progress) -> None:
        if source.activations is not None:
            raise UnsupportedError(
                f"{source.path} quantizes activations to {source.activations.bits} bits, a dense model cannot",
                hint="pack it as qcli, or quantize without activations",
            )
        normed = [layer for layer, format in source.formats().items() if format.normed]
        if normed:
            raise UnsupportedError(
                f"{source.path} norms the outputs of {len(normed)} layers, {normed[0]} first, a dense model cannot",
                hint="pack it as qcli, or quantize without `paper`",
            )
        names = list(source.tensors())
        parts = []
        for number, name in enumerate(names):
            progress("decode", number, len(names))
            parts.append(folder / f"part-{number:06d}.safetensors")
            shards.write_tensors(parts[-1], {name: source.read([name])[name].to(source.dtype)})
        shards.join([read_header(part) for part in parts], folder, shard_size)
        for part in parts:
            part.unlink()
        progress("decode", len(names), len(names))

    def config(self, source: NativeSource) -> dict[str, Any]:
        return {key: value for key, value in source.config.items() if key != "quantization_config"}

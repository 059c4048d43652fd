"""Entries of a checkpoint's config that stand for several layers."""

from __future__ import annotations

from qcli.core.formats.affine import Affine
from qcli.models.families import Linear
from qcli.models.native import NativeStorage, quantization_config


def test_a_shared_entry_matches_no_dense_layer() -> None:
    layers = [Linear(f"layers.{block}.gate", block, 0, (64, 64)) for block in (0, 1)]
    formats = {layer.name: Affine(bits=4, group_size=32) for layer in layers}
    shared = quantization_config(layers, formats)
    assert [entry["match"] for entry in shared["layers"]] == ["layers.*.gate"]
    apart = quantization_config(layers, formats, outside=["layers.2.gate", "norm"])
    storage = NativeStorage(apart)
    assert [name for name in "0123" if storage.layer(f"layers.{name}.gate") is not None] == ["0", "1"]

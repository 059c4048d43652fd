"""Manifests of checkpoints that are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcli.models.manifest import MANIFEST, LayerReport, Manifest, OriginalModel, recipe_sha256
from qcli.utils.sealed import digest


def edit_manifest(folder: Path, change: Callable[[str], str]) -> None:
    """Change the text of a manifest, and its checksum with it."""
    file = folder / MANIFEST
    content = json.loads(change(file.read_text()))
    del content["sha256"]
    file.write_text(json.dumps(content | {"sha256": digest(content)}))


_LAYER = LayerReport(
    name="model.layers.0.mlp.up_proj",
    method="rtn",
    spec={"format": "affine", "bits": 3, "group_size": 32},
    bits_per_weight=3.75,
    error=0.02,
    measure="output",
    fallbacks=[],
)


def layer_report(**changes: Any) -> LayerReport:
    """The report of one layer, rtn at 3 bits in groups of 32 unless changed."""
    return replace(_LAYER, **changes)


def manifest_of(*layers: LayerReport) -> Manifest:
    """The manifest that `qcli quantize` would write for these layers of `org/name`, without data."""
    recipe = {"model": "org/name", "method": {"name": "rtn", "bits": 3}}
    return Manifest(
        recipe_sha256=recipe_sha256(recipe),
        versions={"qcli": "0.1.0"},
        recipe=recipe,
        source=OriginalModel(model="org/name", fingerprint="00"),
        calibration_tokens_sha256=None,
        calibration_text_identity=None,
        seed=0,
        bits_per_weight=3.75,
        model_bits_per_weight=4.5,
        bytes=1000,
        layers=list(layers),
        training={},
        unscaled=[],
        dense={"lm_head.weight": "not a linear layer of a block"},
        seconds=1.5,
        peak_memory={"rss": 1 << 20},
    )

"""The manifest: every key in its place, every field checked, older and newer ones read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qcli.algorithms.training.outcome import Outcome
from qcli.models.manifest import AllocationReport, DistillationReport, Manifest, TrialReport
from qcli.utils.errors import VerificationError
from qcli.utils.sealed import digest
from tests.manifests import layer_report, manifest_of

QUANTIZED = (
    *("format_version", "recipe_sha256", "versions", "recipe", "source", "calibration_tokens_sha256"),
    *("calibration_text_identity", "seed", "bits_per_weight", "model_bits_per_weight", "bytes", "layers", "training"),
    *("unscaled", "dense", "seconds", "peak_memory", "files", "sha256"),
)
OUTCOME = Outcome(before=0.5, after=0.25, best_step=2, steps=4, curve=((0, None, 0.5), (2, 0.75, 0.25)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def written(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "qcli.manifest.json").read_text())
    return content


def rewrite(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the checksum of its content."""
    del content["sha256"]
    (folder / "qcli.manifest.json").write_text(json.dumps(content | {"sha256": digest(content)}))


def test_what_is_written_is_read(folder: Path) -> None:
    manifest_of(layer_report(facts={"zeros_plane1": 0.5})).write(folder)
    content = written(folder)
    assert tuple(content) == QUANTIZED
    assert list(content["files"]) == ["config.json"]
    assert content["files"]["config.json"]["bytes"] == 2
    manifest = Manifest.read(folder)
    manifest.write(folder)
    assert written(folder) == content
    assert manifest.layers == [layer_report(facts={"zeros_plane1": 0.5})]


def test_what_later_commands_add_comes_in_order(folder: Path) -> None:
    """Whatever the order in which it is set, and no key is written that nothing set."""
    allocation = AllocationReport(
        target_bpw=3.5,
        shipped="uniform",
        trials={"uniform": TrialReport(3.25, 0.5, None)},
        held_out_samples=2,
        sensitivity={"up_proj": {"3 bits": 0.125, "4 bits": None}},
    )
    distilled = DistillationReport(
        teacher="org/name",
        text={"data": "wikitext2"},
        tokens_sha256="00",
        seed=0,
        measure="KL",
        outcome=OUTCOME,
        blocks=[OUTCOME],
        seconds=2.0,
        peak_memory={},
    )
    packed = {"packed_as": "gguf", "rounded": [], "notes": {"exact": "yes"}}
    manifest = manifest_of(layer_report()).model_copy(
        update=packed | {"distilled": [distilled], "allocation": allocation}
    )
    manifest.write(folder)
    content = written(folder)
    assert tuple(content) == (
        *(*QUANTIZED[:-2], "allocation", "files", "distilled", "packed_as", "rounded", "notes", "sha256"),
    )
    assert content["allocation"] == asdict(allocation)
    assert content["distilled"] == json.loads(json.dumps([asdict(distilled)]))
    read = Manifest.read(folder)
    assert (read.allocation, read.distilled, read.notes) == (allocation, [distilled], {"exact": "yes"})


def test_manifests_of_older_versions_are_read_and_gain_nothing(folder: Path) -> None:
    manifest_of(layer_report()).write(folder)
    old = written(folder)
    for later in ("calibration_text_identity", "training", "unscaled"):
        del old[later]
    del old["layers"][0]["facts"], old["sha256"]
    (folder / "qcli.manifest.json").write_text(json.dumps(old))
    manifest = Manifest.read(folder)
    assert (manifest.calibration_text_identity, manifest.training, manifest.distilled) == (None, {}, [])
    assert manifest.layers == [layer_report()]
    manifest.write(folder)
    assert written(folder).keys() == old.keys() | {"sha256"}


def test_keys_of_newer_versions_are_ignored(folder: Path) -> None:
    manifest_of(layer_report()).write(folder)
    content = written(folder)
    content |= {"signature": {"key": 1}}
    content["layers"][0] |= {"outliers": 3}
    content["files"]["config.json"] |= {"mode": "0644"}
    rewrite(folder, content)
    manifest = Manifest.read(folder)
    assert manifest.layers == [layer_report()]
    manifest.write(folder)
    assert "signature" not in written(folder) and "outliers" not in written(folder)["layers"][0]


@pytest.mark.parametrize("part", ['"error": 0.02', '"seed": 0', '"method": "rtn"', '"sha256": "', '"sha256"'])
def test_changed_manifests_are_not_believed(folder: Path, part: str) -> None:
    """Also where the change hits the checksum, or its name."""
    manifest_of(layer_report()).write(folder)
    file = folder / "qcli.manifest.json"
    head, _, tail = file.read_text().rpartition(part)
    file.write_text(f"{head}{part[:-2]}{'1' if part[-2] != '1' else '2'}{part[-1]}{tail}")
    with pytest.raises(VerificationError, match=r"qcli\.manifest\.json (was damaged or edited|is not a manifest)"):
        Manifest.read(folder)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"seconds": "long"}, "seconds"),
        ({"layers": [{"name": "up_proj"}]}, r"layers\.0\.method"),
        ({"files": {"config.json": {"bytes": 2}}}, r"files\.config\.json\.sha256"),
        ({"files": {}}, "files"),
        ({"training": {"block 0": {"before": 1.0}}}, r"training\.block 0\.after"),
        ({"seconds": float("nan")}, "seconds"),
        ({"recipe": {"model": "m"}}, "recipe"),
        ({"recipe": {"method": "x"}}, "recipe"),
        ({"recipe": {"method": {}, "transforms": {}}}, "recipe"),
        ({"recipe": {"method": {}, "transforms": ["teq"]}}, "recipe"),
        ({"recipe": {"method": {}, "low_rank": 3}}, "recipe"),
        ({"layers": [asdict(layer_report(spec={"format": "affine"}))]}, "layers"),
        ({"layers": [asdict(layer_report(spec={"bits": "3"}))]}, "layers"),
        ({"layers": [asdict(layer_report(spec={"bits": 3, "base": 3}))]}, "layers"),
        ({"source": {"model": 3, "fingerprint": ""}}, r"source\.model"),
    ],
)
def test_errors_name_file_and_field(folder: Path, change: dict[str, Any], place: str) -> None:
    manifest_of(layer_report()).write(folder)
    rewrite(folder, written(folder) | change)
    with pytest.raises(VerificationError, match=rf"qcli\.manifest\.json is not a manifest: {place}: "):
        Manifest.read(folder)


def test_numbers_that_are_not_finite_survive(folder: Path) -> None:
    stopped = Outcome(before=float("inf"), after=float("inf"), best_step=0, steps=1, stopped="diverged")
    manifest_of(layer_report()).model_copy(update={"training": {"block 0 refine": stopped}}).write(folder)
    assert Manifest.read(folder).training == {"block 0 refine": stopped}

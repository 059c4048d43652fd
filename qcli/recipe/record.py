"""What a checkpoint says of how it was made: manifest, recipe and card, which are the same on every machine.

Folders of the machine are left out: a model or a text that is a path is recorded by the last part of it, and by its
hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcli.data.default_text import AUTO
from qcli.models.card import CARD, card
from qcli.models.folder import read_config
from qcli.models.loadable import loading_code
from qcli.models.manifest import RECIPE, DistillationReport, Manifest
from qcli.models.native import LOADING
from qcli.recipe.dump import to_yaml
from qcli.recipe.yaml import KeyPath
from qcli.utils.files import write_bytes
from qcli.utils.markdown import code
from qcli.utils.paths import portable_name

_CONTROL = ("max_memory", "out", "resume")  # say nothing of the result
_NAMES: tuple[KeyPath, ...] = (
    *(("model",), ("calibration", "data"), ("distill", "data")),
    *(("eval", "perplexity"), ("eval", "baseline"), ("eval", "include_path")),
)


def portable(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields as checkpoints record them."""
    fields = {key: value for key, value in recipe.items() if key not in _CONTROL}
    for path in _NAMES:
        fields = _renamed(fields, path)
    return fields


def portable_manifest(manifest: Manifest) -> Manifest:
    """A manifest with its recipe, model, teachers and texts as checkpoints record them."""
    distilled = [
        replace(report, teacher=portable_name(report.teacher), text=_text_of(report)) for report in manifest.distilled
    ]
    changed: dict[str, Any] = {
        "recipe": _with_texts(portable(manifest.recipe), manifest),
        "source": replace(manifest.source, model=portable_name(manifest.source.model)),
    }
    return manifest.model_copy(update=changed | ({"distilled": distilled} if distilled else {}))


def recipe_yaml(manifest: Manifest) -> str:
    """The recipe of a portable manifest as YAML; what was a path has its hash as a comment."""
    hashes: dict[KeyPath, str | None] = {("calibration", "data"): manifest.calibration_text_identity}
    if manifest.distilled:
        hashes["distill", "data"] = manifest.distilled[-1].text_identity
    comments = {path: f"sha256 {identity}" for path, identity in hashes.items() if identity and len(identity) == 64}
    comments["model",] = f"sha256 of its config and headers {manifest.source.fingerprint}"
    return to_yaml(manifest.recipe, lambda path: comments.get(path, ""))


def write_record(manifest: Manifest, folder: Path) -> Manifest:
    """Write recipe, card and manifest, the last files of a native checkpoint; returns the manifest as written."""
    manifest = portable_manifest(manifest)
    recipe = recipe_yaml(manifest)
    facts = {"layout": "qcli"}
    if manifest.distilled:
        last = manifest.distilled[-1]
        losses = f"held-out loss {last.outcome.before:.4g} before, {last.outcome.after:.4g} after"
        facts["distilled"] = f"from {code(last.teacher)}, {losses}"
    text = card(
        manifest, facts, loading=loading_code(LOADING, read_config(folder)), recipe=recipe, library="transformers"
    )
    write_bytes(folder / RECIPE, recipe.encode())
    write_bytes(folder / CARD, text.encode())
    manifest.write(folder)
    return manifest


def _with_texts(recipe: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """A recipe that names the texts which stood for `auto`."""
    identities = {"calibration": manifest.calibration_text_identity}
    if manifest.distilled:
        identities["distill"] = manifest.distilled[-1].text_identity
    for section, identity in identities.items():
        if identity and (recipe.get(section) or {}).get("data") == AUTO:
            recipe = {**recipe, section: {**recipe[section], "data": identity}}
    return recipe


def _text_of(report: DistillationReport) -> dict[str, Any]:
    text = _renamed(report.text, ("data",))
    return {**text, "data": report.text_identity} if report.text_identity and text.get("data") == AUTO else text


def _renamed(fields: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
    """`fields` with the portable name, or names, at `path`, if anything is there."""
    key, *inner = path
    value = fields.get(str(key))
    if value is None:
        return dict(fields)
    if inner:
        return {**fields, str(key): _renamed(value, tuple(inner))}
    return {**fields, str(key): _portable(value)}


def _portable(value: Any) -> Any:
    """The portable name of a model or a text, which may be a mapping, or a list of them."""
    if isinstance(value, list | tuple):
        return [_portable(each) for each in value]
    return {**value, "path": portable_name(value["path"])} if isinstance(value, Mapping) else portable_name(value)

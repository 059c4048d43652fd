"""The `README.md` of a checkpoint: what it is, how to load it, and the recipe that it was made by."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qcli.models.facts import facts_in_words
from qcli.models.manifest import LayerReport, Manifest
from qcli.utils.markdown import code, plain

CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def card(
    manifest: Manifest, facts: Mapping[str, str], *, loading: str, recipe: str, library: str, layout: str = "qcli"
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        manifest: of the checkpoint; its `source.model` is a hub id, or the name of a folder or file.
        facts: further rows of the card's table, as Markdown.
        loading: how to load it, as Markdown.
        recipe: YAML.
        library: what the hub calls the software that loads it.
        layout: of the checkpoint, a tag.
    """
    model = manifest.source.model
    tags = dict.fromkeys(("quantized", "qcli", layout))
    front = [f"library_name: {library}", f"tags: [{', '.join(tags)}]"]
    front += [f"{key}: {json.dumps(value)}" for key, value in (manifest.source.license or {}).items()]
    if _HUB_ID.fullmatch(model) is not None and not model.endswith(".gguf"):
        front = [f"base_model: {model}", "base_model_relation: quantized", *front]
    rows = {
        "base model": code(model) + _details(manifest),
        "method": plain(_counted(_method(layer) for layer in manifest.layers)),
        **{layer.name: plain(_method(layer)) for layer in manifest.vocabulary},
        "bits per weight": f"{manifest.bits_per_weight:.3g} in the quantized layers, "
        f"{manifest.model_bits_per_weight:.3g} in the whole model, every stored table counted",
        **facts_in_words(manifest.facts),
        **facts,
        "relative error": plain(_errors(manifest.layers)),
    }
    table = "\n".join(f"| {plain(label)} | {fact} |" for label, fact in rows.items())
    return (
        "---\n" + "\n".join(front) + f"\n---\n\n# {plain(model)}, quantized by qcli\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Loading\n\n{loading}\n\n## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n"
    )


def _details(manifest: Manifest) -> str:
    """The base model's commit, and that it was quantized before."""
    quantized_as = manifest.source.quantized_as
    at = "" if manifest.source.revision is None else f" at {code(manifest.source.revision)}"
    return at if quantized_as is None else f"{at}, quantized already ({plain(quantized_as)})"


def _method(layer: LayerReport) -> str:
    spec = layer.spec
    size = spec.get("group_size") or spec.get("base", {}).get("group_size")
    groups = "" if size is None else ", rows" if size == -1 else f", groups of {size}"
    return f"{layer.method} ({spec['bits']} bits{groups})"


def _counted(words: Iterable[str]) -> str:
    counts = Counter(words)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{word}: {count} layers" for word, count in counts.most_common())


def _errors(layers: Sequence[LayerReport]) -> str:
    """Mean relative error of the layers, by measure."""
    kinds: dict[str, list[float]] = {}
    for layer in layers:
        kinds.setdefault(layer.measure, []).append(layer.error)
    return "; ".join(
        f"{sum(errors) / len(errors):.3g} of the {kind}, mean of {len(errors)} layers" for kind, errors in kinds.items()
    )

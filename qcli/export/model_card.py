"""The `README.md` of a packed checkpoint: what it is, its quality loss, how to load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qcli.export.result import PackResult
from qcli.export.target import ExportTarget
from qcli.models.manifest import LayerReport, Manifest


def model_card(
    manifest: Manifest,
    result: PackResult,
    target: ExportTarget,
    recipe: str,
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        manifest: of the checkpoint that was packed.
        target: what wrote the result.
        recipe: the checkpoint's recipe as YAML.
        evaluation: `Evaluation.to_json` of the checkpoint.
    """
    model = manifest.source.model
    looks_like_an_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) is not None and not model.endswith(".gguf")
    on_hub = looks_like_an_id and not Path(model).exists()  # so does the relative path of a folder
    title = model if on_hub else model.rstrip("/").rpartition("/")[2]
    facts = {
        "base model": f"`{title}`",
        "method": _counted(_method(layer) for layer in manifest.layers),
        "bits per weight": f"{result.bits_per_weight:.3g} in the quantized layers, "
        f"{result.model_bits_per_weight:.3g} in the whole model, every stored table counted",
        "layout": result.format,
        **result.notes,
        "read back": f"logits differ from the quantized checkpoint's by at most {result.max_logit_difference:.3g} "
        f"(KL {result.kl:.3g})",
        "relative error": _errors(manifest.layers),
        **(_measured(evaluation) if evaluation is not None else {}),
    }
    front = [f"library_name: {target.hub_library}", "tags: [quantized, qcli]"]
    if on_hub:
        front = [f"base_model: {model}", "base_model_relation: quantized", *front]
    rows = "\n".join(f"| {label} | {fact} |" for label, fact in facts.items())
    return (
        "---\n" + "\n".join(front) + f"\n---\n\n# {title}, quantized by qcli\n\n| | |\n|---|---|\n{rows}\n\n"
        f"## Loading\n\n{target.loading}\n\n## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n"
    )


def _measured(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The quality loss, by metric."""
    before, facts = evaluation["baseline"], {}
    if texts := evaluation.get("fitted_to"):  # evaluations of earlier versions have none
        facts["measured on text it was fitted to"] = f"{', '.join(map(_title, texts))}: on other text it loses more"
    if evaluation["kl"] is not None:
        worst = f"{evaluation['worst_window_kl']:.4g} in the window that lost most"
        facts["KL to the base model"] = f"{evaluation['kl']:.4g} a token, {worst}"
        facts["same likeliest token"] = f"{evaluation['top1_agreement']:.1%}"
    for data, score in evaluation["perplexity"].items():
        was = "" if before is None else f", the base model's {_number(before['perplexity'][data])}"
        facts[f"perplexity, {_title(data)}"] = (
            f"{_number(score['value'])}{was} ({score['windows']} windows of {score['window']} tokens)"
        )
    for task, score in evaluation["tasks"].items():
        was = "" if score["baseline"] is None else f", the base model's {_number(score['baseline'])}"
        facts[f"{task}, {score['metric']}"] = f"{_number(score['score'])}{was} ({score['samples']} questions)"
    return facts


def _title(data: str) -> str:
    """A text's name without its folders, which say nothing on another machine."""
    return data.rstrip("/").rpartition("/")[2]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


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

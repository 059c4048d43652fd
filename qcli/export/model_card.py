"""The `README.md` of a packed checkpoint: what it is, its quality loss, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcli.evaluation.severity import kl_word
from qcli.export.result import PackResult
from qcli.models.card import card
from qcli.models.manifest import Manifest
from qcli.utils.markdown import plain
from qcli.utils.paths import portable_name


def model_card(
    manifest: Manifest,
    result: PackResult,
    loading: str,
    recipe: str,
    evaluation: Mapping[str, Any] | None = None,
    *,
    library: str = "transformers",
    compared: str = "the quantized checkpoint",
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    Args:
        manifest: of the packed checkpoint.
        loading: how to load it, as Markdown.
        recipe: the checkpoint's recipe as YAML.
        evaluation: `Evaluation.to_json` of the checkpoint.
        library: what the hub calls the software that loads it.
        compared: with what the result was compared.
    """
    facts = {
        "layout": result.format,
        **{label: plain(note) for label, note in result.notes.items()},
        "read back": f"logits differ from {compared}'s by at most {result.max_logit_difference:.3g} "
        f"(KL {result.kl:.3g})",
        "run in": plain(result.proof.described()),
        **(_measured(evaluation) if evaluation is not None else {}),
    }
    return card(manifest, facts, loading=loading, recipe=recipe, library=library, layout=result.format)


def _measured(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """The quality loss, by metric."""
    before, facts = evaluation["baseline"], {}
    if texts := evaluation.get("fitted_to"):  # evaluations of earlier versions have none
        facts["measured on text it was fitted to"] = f"{', '.join(map(_title, texts))}: on other text it loses more"
    if evaluation["kl"] is not None:
        worst = f"{evaluation['worst_window_kl']:.4g} in the window that lost most"
        facts["KL to the base model"] = f"{evaluation['kl']:.4g} a token, {worst}: {kl_word(evaluation['kl'])}"
        facts["same likeliest token"] = f"{evaluation['top1_agreement']:.1%}"
    for data, score in evaluation["perplexity"].items():
        was = "" if before is None else f", the base model's {_number(before['perplexity'][data])}"
        facts[f"perplexity, {portable_name(data)}"] = (
            f"{_number(score['value'])}{was} ({score['windows']} windows of {score['window']} tokens"
            f"{', each behind a begin token' if score.get('bos') else ''})"
        )
    for task, score in evaluation["tasks"].items():
        was = "" if score["baseline"] is None else f", the base model's {_number(score['baseline'])}"
        facts[f"{task}, {score['metric']}"] = f"{_number(score['score'])}{was} ({score['samples']} questions)"
    return facts


def _title(data: str) -> str:
    return plain(portable_name(data))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"

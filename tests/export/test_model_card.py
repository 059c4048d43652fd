"""Model cards of packed checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from qcli.export.model_card import model_card
from qcli.export.pack import pack
from qcli.export.result import PackResult, Proof
from qcli.export.targets.dense import Dense
from qcli.export.targets.gguf import GGUF
from qcli.export.verify import verify
from qcli.models.manifest import LayerReport
from qcli.recipe.record import portable_manifest
from qcli.utils.registry import names
from tests.manifests import layer_report, manifest_of
from tests.quantizing import run
from tests.tiny import tiny_model, with_merge

RESULT = PackResult(
    out=Path("packed"),
    format="dense",
    files=1,
    bits_per_weight=16.0,
    model_bits_per_weight=16.0,
    bytes=1000,
    rounded=0,
    max_logit_difference=0.0,
    kl=0.0,
    notes={},
    proof=Proof("transformers 5.0", blocks=2, of=8, max_logit_difference=0.25),
    loading="",
)


@pytest.mark.parametrize("format", names("qcli.export.targets"))
def test_every_target_is_verified_and_has_a_card(format: str, tmp_path: Path) -> None:
    run(with_merge(tiny_model("llama", tmp_path)), tmp_path / "native", method__name="rtn", method__symmetric=True)
    out = tmp_path / "packed"
    result = pack(tmp_path / "native", out, format=format, shard_size=10**9)
    assert (result.format, result.files) == (format, 1)
    assert result.max_logit_difference == 0
    checked = verify(out)
    assert checked.layers == 14
    assert checked.unlisted == []
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert "quantized" in YAML(typ="safe", pure=True).load(front)["tags"]
    assert "rtn (4 bits, groups of 32)" in body
    assert (out / "recipe.yaml").read_text().strip() in body
    assert f"| layout | {format} |" in body
    assert str(tmp_path) not in card


def test_card_of_a_mixed_checkpoint_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(bits: int, error: float) -> LayerReport:
        spec = {"format": "affine", "bits": bits, "group_size": -1}
        return layer_report(method="gptq-like", spec=spec, bits_per_weight=bits, error=error)

    manifest = manifest_of(layer(3, 0.02), layer(3, 0.04), layer(4, 0.0))
    result = replace(RESULT, format="gguf", bits_per_weight=4.5, max_logit_difference=0.5, notes={"exact": "none"})
    card = model_card(manifest, result, GGUF.loading, "bits: 3\n", library=GGUF.hub_library)
    front = YAML(typ="safe", pure=True).load(card.split("---\n")[1])
    assert (front["base_model"], front["library_name"]) == ("org/name", "gguf")
    assert "| method | gptq-like (3 bits, rows): 2 layers, gptq-like (4 bits, rows): 1 layers |" in card
    assert "| relative error | 0.02 of the output, mean of 3 layers |" in card
    assert "| exact | none |" in card
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = model_card(portable_manifest(manifest), result, GGUF.loading, "bits: 3\n", library=GGUF.hub_library)
    assert "base_model" not in local and "# name, quantized" in local, "a folder of that name is here"


def test_card_reports_the_evaluation() -> None:
    evaluation = {
        "fitted_to": ["a/b.txt"],
        "kl": 0.0123456,
        "worst_window_kl": 0.25,
        "top1_agreement": 0.9512,
        "baseline": {"model": "org/name", "perplexity": {"wikitext2": 25.0, "a/b.txt": 7.0}},
        "perplexity": {
            "wikitext2": {"value": 26.5, "windows": 20, "window": 512},
            "a/b.txt": {"value": None, "windows": 1, "window": 64},
        },
        "tasks": {"arc_easy": {"metric": "acc", "score": 0.5, "baseline": 0.625, "samples": 40}},
    }
    manifest = manifest_of(layer_report(measure="weight"))
    card = model_card(manifest, RESULT, Dense.loading, "bits: 3\n", evaluation)
    for row in (
        "| run in | transformers 5.0, the first 2 of 8 blocks: logits differ by at most 0.25 (KL 0) |",
        "| KL to the base model | 0.01235 a token, 0.25 in the window that lost most: near-lossless |",
        "| measured on text it was fitted to | b.txt: on other text it loses more |",
        "| same likeliest token | 95.1% |",
        "| perplexity, wikitext2 | 26.5, the base model's 25 (20 windows of 512 tokens) |",
        "| perplexity, b.txt | not finite, the base model's 7 (1 windows of 64 tokens) |",
        r"| arc\_easy, acc | 0.5, the base model's 0.625 (40 questions) |",
    ):
        assert row in card

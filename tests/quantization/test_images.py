"""Models that see images too: the language model is quantized, with text, and the rest is kept as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from qcli.export.pack import pack
from qcli.inference.generate import Generator, Sampling
from qcli.inference.load import load_model
from qcli.models.open import open_source
from qcli.quantization.plan import make_plan
from qcli.recipe.load import load_recipe
from qcli.utils.errors import UnsupportedError
from tests.images import with_image
from tests.quantizing import TOKENS, logits, run, streamed, write_text
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
PARTS = {
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen2_5_vl": ("model.visual",),
    "qwen3_vl_moe": ("model.visual",),
}


@torch.no_grad()
def outputs(model: Any, model_type: str) -> tuple[Tensor, Tensor]:
    """Logits of text, and of text with an image."""
    return model(input_ids=TOKENS).logits, model(**with_image(model_type)).logits


@pytest.mark.parametrize("model_type", PARTS)
def test_text_is_quantized_and_images_are_seen_as_before(model_type: str, tmp_path: Path) -> None:
    model, out = tiny_model(model_type, tmp_path), tmp_path / "out"
    image_text: Any = AutoModelForImageTextToText
    original = image_text.from_pretrained(model, dtype=torch.float32).eval()
    full, full_image = outputs(original, model_type)
    torch.testing.assert_close(streamed(model), full, rtol=1e-4, atol=1e-4)

    result = run(model, out, write_text(tmp_path), method__name="gptq-like", method__bits=8)
    assert {layer.block for layer in result.plan.layers} == {0, 1}
    packed = streamed(out)
    loaded = image_text.from_pretrained(out, dtype=torch.float32).eval()
    for reopened in (loaded, load_model(open_source(str(out)), CPU, torch.float32)):
        text, image = outputs(reopened, model_type)
        torch.testing.assert_close(text, packed, rtol=1e-4, atol=1e-4)
        target = full_image.log_softmax(-1)
        assert (target.exp() * (target - image.log_softmax(-1))).sum(-1).median() < 1e-3
        assert not torch.equal(image, full_image)
        for part in PARTS[model_type]:
            kept = reopened.get_submodule(part).state_dict()
            for name, tensor in original.get_submodule(part).state_dict().items():
                assert torch.equal(kept[name], tensor)
    assert not torch.equal(packed, full)


@pytest.mark.parametrize("model_type", PARTS)
def test_the_plan_lists_what_text_does_not_pass(model_type: str, tmp_path: Path) -> None:
    given = {"model": str(tiny_model(model_type, tmp_path)), "method.name": "rtn", "method.group_size": 32}
    plan = make_plan(load_recipe(None, given)).to_json()
    assert tuple(plan["dense_parts"]) == PARTS[model_type]
    assert not any(layer["name"].startswith(PARTS[model_type]) for layer in plan["layers"])


@pytest.mark.parametrize("format", ["dense", "compressed-tensors"])
def test_packs_load_with_images(format: str, tmp_path: Path) -> None:
    symmetric: dict[str, Any] = {"method__symmetric": True} if format == "compressed-tensors" else {}
    run(tiny_model("qwen2_5_vl", tmp_path), tmp_path / "q", method__name="rtn", **symmetric)
    result = pack(tmp_path / "q", tmp_path / "packed", format=format, shard_size=10**9, allow_refused=True)
    assert result.proof is None or result.proof.engine is None or result.proof.kl < 1e-2
    assert "AutoModelForCausalLM" not in (tmp_path / "packed" / "README.md").read_text()
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    if format == "compressed-tensors":
        assert r"re:.*visual\..*" in config["quantization_config"]["ignore"]
    else:
        image_text: Any = AutoModelForImageTextToText
        text, _ = outputs(image_text.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval(), "qwen2_5_vl")
        torch.testing.assert_close(text, streamed(tmp_path / "q"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "reason"), [("gptq", "cannot say that model.visual is dense"), ("gguf", "qwen2_5_vl")]
)
def test_layouts_that_cannot_tell_parts_apart_are_refused(format: str, reason: str, tmp_path: Path) -> None:
    run(tiny_model("qwen2_5_vl", tmp_path), tmp_path / "q", method__name="rtn", method__symmetric=True)
    with pytest.raises(UnsupportedError, match=reason):
        pack(tmp_path / "q", tmp_path / "packed", format=format, shard_size=10**9)


def test_the_processor_goes_along(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor

    model, out = tiny_model("llava", tmp_path), tmp_path / "out"
    size = {"height": 28, "width": 28}
    processor: Any = LlavaProcessor
    pixels: Any = CLIPImageProcessorPil(size=size, crop_size=size)
    processor(pixels, tiny_tokenizer(), patch_size=14, vision_feature_select_strategy="default").save_pretrained(model)
    (model / "video_preprocessor_config.json").write_text("{}")
    run(model, out, method__name="rtn")
    auto: Any = AutoProcessor
    assert auto.from_pretrained(out).to_dict() == auto.from_pretrained(model).to_dict()
    kept = {file.name for file in model.iterdir() if not file.name.startswith("model")}
    assert {"processor_config.json", "chat_template.jinja"} < kept == kept & {file.name for file in out.iterdir()}


def test_text_is_generated(tmp_path: Path) -> None:
    """As transformers does, whose positions have three parts."""
    source = open_source(str(tiny_model("qwen2_5_vl", tmp_path)))
    model = load_model(source, CPU, torch.float32)
    prompt = TOKENS[0, :9].tolist()
    made = Generator(source, model, source.tokenizer()).generate(prompt, Sampling(8, 0.0), lambda _: None)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert made.tokens == expected[0, 9:].tolist()


def test_a_language_model_alone_loads_too(tmp_path: Path) -> None:
    """Where transformers has a class for it, in which layers have other names."""
    model, out = tiny_model("qwen3_5", tmp_path), tmp_path / "out"
    run(model, out, method__name="rtn")
    torch.testing.assert_close(logits(out), streamed(out), rtol=1e-4, atol=1e-4)
    image_text: Any = AutoModelForImageTextToText
    whole = image_text.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=TOKENS).logits, logits(out), rtol=1e-4, atol=1e-4)
    kept = image_text.from_pretrained(model, dtype=torch.float32).model.visual.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in whole.model.visual.state_dict().items())


def test_blocks_that_text_does_not_pass_stay_dense(tmp_path: Path) -> None:
    """Those that attend to an image: without one, they do nothing."""
    model, out = tiny_model("mllama", tmp_path), tmp_path / "out"
    result = run(model, out, method__name="rtn")
    assert {layer.block for layer in result.plan.layers} == {0}
    image_text: Any = AutoModelForImageTextToText
    assert torch.isfinite(image_text.from_pretrained(out, dtype=torch.float32)(input_ids=TOKENS).logits).all()
    with pytest.raises(UnsupportedError, match="'mllama': its blocks cannot run one by one"):
        run(model, tmp_path / "other", write_text(tmp_path), method__name="gptq-like")

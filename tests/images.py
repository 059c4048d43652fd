"""Tokens with an image among them, as the processors of tiny models make them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.quantizing import TOKENS
from tests.tiny import tiny_tokenizer

_BLOCK_OF_PATCHES: dict[str, tuple[int, ...]] = {"pixel_values": (1, 3, 28, 28)}  # a token for each of 2 x 2 patches
# Of those whose processors give images as pictures: the shapes of what they give.
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "llava": _BLOCK_OF_PATCHES,
    "gemma3": _BLOCK_OF_PATCHES,
    "idefics3": {"pixel_values": (1, 1, 3, 56, 56)},
    "mistral3": {"pixel_values": (1, 3, 56, 56)},
    "internvl": {"pixel_values": (1, 3, 56, 56)},
    "gemma4": {"pixel_values": (1, 16, 48)},
}


def with_image(model_type: str, length: int = TOKENS.shape[1]) -> dict[str, Tensor]:
    """What a processor makes of `length` tokens, at most 24, that have an image among them."""
    drawn = torch.Generator().manual_seed(5 + length)
    tokens = TOKENS[:1, :length].clone()
    if model_type in _SHAPES:
        tokens[:, 5:9] = 3
        pixels = {name: torch.randn(shape, generator=drawn) for name, shape in _SHAPES[model_type].items()}
        if model_type == "mistral3":
            pixels["image_sizes"] = torch.tensor([[56, 56]])
        if model_type == "gemma4":
            places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
            pixels |= {"image_position_ids": places[None], "mm_token_type_ids": (tokens == 3).int()}
        types = {"token_type_ids": (tokens == 3).long()} if model_type == "gemma3" else {}
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **pixels, **types}
    tokens[:, 5] = 3  # 2 x 2 patches are merged to one
    size = 3 * 2 * (14 if model_type == "qwen2_5_vl" else 16) ** 2
    grid = torch.tensor([[1, 2, 2]])
    pixels = {"pixel_values": torch.randn(4, size, generator=drawn), "image_grid_thw": grid}
    return {"input_ids": tokens, **pixels, "mm_token_type_ids": (tokens == 3).int()}


def with_processor(model_type: str, model: Path) -> Path:
    """Add a processor to a model's folder: those of `llava` and `idefics3` run without torchvision."""
    from transformers import (
        CLIPImageProcessorPil,
        Idefics3ImageProcessorPil,
        Idefics3Processor,
        LlavaProcessor,
    )

    shown = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    template = "{% for m in messages %}{% for part in m['content'] %}" + shown + "{% endfor %}|{% endfor %}"
    tokenizer = tiny_tokenizer()
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    pixels: Any
    make: Any
    if model_type == "llava":
        size = {"height": 28, "width": 28}
        pixels, make = CLIPImageProcessorPil, LlavaProcessor
        settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        made = make(pixels(size=size, crop_size=size), tokenizer, chat_template=template, **settings)
    else:
        edge = {"longest_edge": 56}
        pixels, make = Idefics3ImageProcessorPil, Idefics3Processor
        image = pixels(size=edge, max_image_size=edge, do_image_splitting=False)
        made = make(image, tokenizer, image_seq_len=4, chat_template=template)
    made.save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    places = {"image_token_index", "image_token_id"} & config.keys()
    config |= dict.fromkeys(places, tokenizer.convert_tokens_to_ids("<image>"))
    (model / "config.json").write_text(json.dumps(config))
    return model


def picture(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A file of a random image."""
    from PIL import Image

    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "png")
    return file.getvalue()


def write_pairs(folder: Path, count: int = 8, name: str = "pairs.jsonl") -> Path:
    """A file of rows with texts of several lengths, that name images beside it."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
        rows.append({"image": f"{number}.png", "text": f"picture {number} " + "of a cat " * (1 + number % 3)})
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

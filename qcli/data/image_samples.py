"""Samples of text and images as a model's processor makes them, one at a time: pixels take far more room than rows."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from qcli.data.chats import template_of
from qcli.data.image_rows import ImageRow, draw_rows
from qcli.models.source import first_line
from qcli.models.stream_samples import OF_TEXT
from qcli.utils.errors import QcliError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from qcli.models.source import ModelSource


@dataclass(frozen=True)
class ImageSamples:
    """Samples of text and images, which `processed` makes of rows.

    Attributes:
        rows: number and row of each; numbers stay when samples are divided.
        lengths: tokens of each.
        sha256: SHA-256 of all that the processor makes of all samples of which these are a part.
        images_sha256: SHA-256 of the SHA-256 of each of their images, in order.
    """

    rows: tuple[tuple[int, ImageRow], ...]
    lengths: tuple[int, ...]
    sha256: str
    images_sha256: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> ImageSamples:
        return replace(self, rows=self.rows[part], lengths=self.lengths[part])

    @property
    def mean_length(self) -> int:
        """Tokens of a sample."""
        return sum(self.lengths) // len(self.lengths)


Samples: TypeAlias = "Tensor | ImageSamples"
"""Of a calibration: token windows, int64 `[samples, length]`, or samples of text and images."""


def processed(samples: ImageSamples, source: ModelSource) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Number of each sample, and what the model's processor makes of it: the inputs of a forward pass, a batch of one.

    Raises:
        UnsupportedError: as `image_samples`.
    """
    processor = _Processor(source)
    for number, row in samples.rows:
        yield number, processor(row)


def image_samples(data: str, source: ModelSource, *, samples: int, seq_len: int, seed: int) -> ImageSamples:
    """Samples drawn at random from the rows of a file.

    Args:
        samples: how many.
        seq_len: tokens that a sample has at most, those of images counted.

    Raises:
        UsageError: the file is damaged or has too few rows; a row has no text, no readable image, or too many tokens.
        UnsupportedError: the model has no processor, or it does not take such rows.
    """
    rows = draw_rows(data, samples, seed)
    processor = _Processor(source)
    digest, lengths = hashlib.sha256(), []
    for row in rows:
        inputs = processor(row)
        lengths.append(inputs["input_ids"].shape[1])
        for name, tensor in inputs.items():
            digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    if long := [number for number, length in enumerate(lengths) if length > seq_len]:
        longest = max(long, key=lengths.__getitem__)
        raise UsageError(
            f"{rows[longest].place}: {lengths[longest]} tokens, those of images counted, and calibration.seq_len is "
            f"{seq_len}; so it is with {len(long)} of {len(rows)} samples",
            hint=f"use --seq-len {lengths[longest]}, or smaller images",
        )
    limit = source.context_length
    if limit is not None and max(lengths) > limit:
        raise UsageError(f"{data}: samples of {max(lengths)} tokens do not fit the model's context of {limit}")
    images = [hashlib.sha256(image).hexdigest() for row in rows for image in row.images]
    together = hashlib.sha256("".join(images).encode()).hexdigest()
    return ImageSamples(tuple(enumerate(rows)), tuple(lengths), digest.hexdigest(), together)


class _Processor:
    """What a model's processor makes of rows."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    @cached_property
    def _made(self) -> Any:
        return self._source.processor()

    def __call__(self, row: ImageRow) -> dict[str, Tensor]:
        """The inputs of the model's forward pass, a batch of one."""
        images = [_decoded(image, row.place) for image in row.images]
        try:
            made = self._process(row, images)
        except (QcliError, MemoryError):
            raise
        except Exception as error:  # of whatever type the processor's code raises
            raise UnsupportedError(
                f"{row.place}: the model's processor fails on this row ({first_line(error)})",
                hint="its text or messages must be as the model's processor takes them",
            ) from error
        inputs = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        if (ids := inputs.get("input_ids")) is None or ids.ndim != 2 or len(ids) != 1:
            raise UnsupportedError(f"{row.place}: the model's processor makes no tokens of this row")
        if images and not inputs.keys() - OF_TEXT:
            raise UnsupportedError(f"{row.place}: the model's processor makes nothing of the images of this row")
        return inputs

    def _process(self, row: ImageRow, images: list[Any]) -> Mapping[str, Any]:
        processor = self._made
        token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
        text, messages, template = row.text, row.messages, template_of(processor)
        if text is not None and images and not (isinstance(token, str) and token in text):
            if template:
                shown = [{"type": "image"}] * len(images)
                text, messages = None, ({"role": "user", "content": [*shown, {"type": "text", "text": text}]},)
            elif isinstance(token, str):
                text = token * len(images) + text
            else:
                raise UnsupportedError(
                    f"{row.place}: the model has no chat template that would say where images stand",
                    hint="write the model's own tokens for images into the text",
                )
        if text is not None:
            return dict(processor(text=[text], images=[images] if images else None, return_tensors="pt"))
        if not template:
            raise UnsupportedError(
                f"{row.place}: 'messages' need a chat template, and the model has none", hint="use 'text'"
            )
        left = iter(images)
        chat = [
            {**message, "content": [_with_image(part, left) for part in message["content"]]} for message in messages
        ]
        made = processor.apply_chat_template(
            chat, chat_template=template, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(made)


def _with_image(part: dict[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    """A part of a message with the next of its row's images, if it shows one."""
    return {**part, "image": next(images)} if part["type"] == "image" else part


def _decoded(image: bytes, place: str) -> Any:
    """An image in three colors, as PIL has it."""
    try:
        from PIL import Image
    except ImportError:
        raise UnsupportedError("images need the package pillow", hint="pip install pillow") from None
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{place}: an image that cannot be read: {first_line(error)}", hint="remove the row") from None

"""Where windows start in a text: at random places, those that must not overlap others apart from them."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from qcli.utils.errors import UsageError


def window_offsets(
    data: str, span: int, length: int, *, samples: int, held_out: int, validation: int, seed: int | str
) -> list[int]:
    """Where windows of `span` tokens start in a text of `length` tokens.

    Args:
        data: the text's name, for messages.
        samples, held_out, validation, seed: as of a `TokenRequest`.

    Raises:
        UsageError: the text is too short for windows that do not overlap.
    """
    generator, last = random.Random(seed), length - span
    offsets = [generator.randrange(0, last) for _ in range(samples)]
    free = _FreeOffsets(length, span, data)
    if 0 < held_out < samples:
        kept = offsets[-held_out:]
        for offset in kept:
            free.take(offset)
        others = free.offsets("use more text, or a smaller --seq-len")
        offsets = [
            offset if free.has(offset) else int(generator.choice(others)) for offset in offsets[:-held_out]
        ] + kept
    if validation:
        for offset in offsets:
            free.take(offset)
    for _ in range(validation):
        offset = generator.randrange(0, last)
        if not free.has(offset):
            offset = int(generator.choice(free.offsets("use more text, fewer --samples, or a smaller --seq-len")))
        free.take(offset)
        offsets.append(offset)
    return offsets


class _FreeOffsets:
    """Offsets of a text where a window overlaps none of those that have been taken."""

    def __init__(self, length: int, window: int, data: str) -> None:
        self.length, self.window, self.data = length, window, data
        self._free = torch.ones(length - self.window, dtype=torch.bool)

    def take(self, offset: int) -> None:
        """Place a window here."""
        self._free[max(0, offset - self.window + 1) : offset + self.window] = False

    def has(self, offset: int) -> bool:
        """Whether a window here overlaps no other."""
        return bool(self._free[offset])

    def offsets(self, hint: str) -> Tensor:
        """All free offsets, int64.

        Raises:
            UsageError: there are so few that windows would be nearly identical.
        """
        offsets = torch.nonzero(self._free).flatten()
        if len(offsets) < min(self.window, self.length - self.window):
            raise UsageError(
                f"{self.data}: too short for samples that do not overlap: its {self.length} tokens leave too little "
                f"room for windows of {self.window}",
                hint=hint,
            )
        return offsets

"""A KL divergence in a word. The figures behind the limits: docs/kl.md."""

from __future__ import annotations

import math

from qcli.utils.text import significant

KL_WORDS = ((0.02, "near-lossless"), (0.1, "mild"), (0.5, "noticeable"), (math.inf, "severe"))
"""By the largest KL to full precision, in nats per token, that the word stands for."""

SEVERE = KL_WORDS[-2][0]
"""A loss is severe if its KL is above this."""


def kl_word(kl: float) -> str:
    """The word for a KL divergence; one that is not finite is severe."""
    return next((word for limit, word in KL_WORDS if kl <= limit), KL_WORDS[-1][1])


def with_word(kl: float) -> str:
    """A KL divergence and its word: `0.0487 (mild)`."""
    return f"{significant(kl)} ({kl_word(kl)})" if math.isfinite(kl) else f"not finite ({kl_word(kl)})"


def scale() -> str:
    """All words with their limits, in a sentence."""
    limits = (f"up to {limit:g} {word}" for limit, word in KL_WORDS[:-1])
    return f"KL: {', '.join(limits)}, above {KL_WORDS[-1][1]}"

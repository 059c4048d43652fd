"""Whether a packed checkpoint reads back: every weight compared, then the logits of one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcli.export.target import ExportTarget
from qcli.models.native import NativeSource
from qcli.models.open import ModelSource
from qcli.models.stream import ModelStream
from qcli.utils.device import matmul_precision
from qcli.utils.errors import VerificationError
from qcli.utils.progress import Progress

_PROBE_TOKENS = 64
# GGUF's norms may be off by a float32 rounding, which bfloat16 can make one of its own; a wrong config is far off.
_MAX_KL = 1e-3


@dataclass(frozen=True)
class LogitDifference:
    """How far the logits of two models are apart: the largest absolute difference, and KL in nats per token."""

    maximum: float
    kl: float


def compare(source: NativeSource, written: ModelSource, target: ExportTarget, progress: Progress) -> LogitDifference:
    """Compare what was written with what was packed.

    Raises:
        VerificationError: a weight differs by more than the target's tolerance, or the logits differ although no
            layer was requantized.
    """
    names = list(source.tensors())
    for number, name in enumerate(names):
        progress("compare", number, len(names))
        expected, actual = source.read([name])[name], written.read([name])[name]
        if not _close(expected.to(actual.dtype), actual, target.tolerance(name, expected)):
            raise VerificationError(
                f"{name} does not read back as it was", hint="this is a bug of qcli or a failing disk"
            )
    before, after = (probed(model, source.dtype) for model in (source, written))
    progress("compare", len(names), len(names))
    maximum, kl = difference(before, after)
    if not target.rounded() and before.isfinite().all() and not kl <= _MAX_KL:
        raise VerificationError(
            f"all weights read back, but the logits differ from those of the quantized checkpoint (KL {kl:.3g})",
            hint="this is a bug of qcli",
        )
    return LogitDifference(maximum, kl)


def difference(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference of two logits `[batch, length, vocab]`, and their KL in nats per token."""
    kl = float((before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1).mean())
    return float((before - after).abs().max()), kl


def probe(vocabulary: int) -> torch.Tensor:
    """The tokens of the compared batch: int64 `[1, length]`, the same at every call."""
    return torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))


def _close(expected: torch.Tensor, actual: torch.Tensor, tolerance: float) -> bool:
    if tolerance == 0:
        return torch.equal(expected, actual)
    return expected.shape == actual.shape and bool((expected - actual).abs().max() <= tolerance)


@torch.no_grad()
def probed(model: ModelSource, dtype: torch.dtype) -> torch.Tensor:
    """Logits of the compared batch, float32 `[1, length, vocab]`, one block in memory at a time."""
    stream = ModelStream(model, device=torch.device("cpu"), dtype=dtype)
    tokens = probe(stream.model.get_input_embeddings().num_embeddings)
    with matmul_precision(fast=False):
        return stream.logits_of(tokens).float()

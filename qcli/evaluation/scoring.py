"""Compares the predictions of two models, from the hidden states that left their last blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from qcli.data.tokens import Tokens
from qcli.evaluation.results import Score
from qcli.models.stream import ModelStream
from qcli.utils.errors import UsageError, VerificationError
from qcli.utils.progress import Progress

_LOGITS = 1 << 25  # logits in memory at a time, a model


@dataclass(frozen=True)
class Run:
    """A model, and by data set the hidden states after its last block, `[batch, length, hidden]` each."""

    name: str
    stream: ModelStream
    hidden: list[list[Tensor]]

    def windows(self, index: int) -> list[Tensor]:
        """Hidden states `[length, hidden]` of each window of a data set; views."""
        return [window for batch in self.hidden[index] for window in batch]


def score(tokens: Tokens, index: int, own: Run, baseline: Run | None, progress: Progress) -> Score:
    """Compare predictions window by window; sums over tokens are float64.

    Args:
        index: of the data set in `own` and `baseline`.

    Raises:
        UsageError: the models have different vocabularies.
        VerificationError: logits are not finite.
    """
    windows, window = tokens.ids.shape
    positions = _LOGITS // own.stream.config.get_text_config().vocab_size
    states, baseline_states = own.windows(index), [] if baseline is None else baseline.windows(index)
    nll = baseline_nll = agreed = 0.0
    kl = [0.0] * windows
    for row in range(windows):
        for start in range(0, window - 1, positions):
            stop = min(start + positions, window - 1)
            targets = tokens.ids[row, start + 1 : stop + 1]
            log = _log_probabilities(own, states[row][start:stop])
            nll += _nll(log, targets)
            if baseline is not None:
                reference = _log_probabilities(baseline, baseline_states[row][start:stop])
                if log.shape != reference.shape:
                    raise UsageError(
                        f"{own.name} and baseline have vocabularies of {log.shape[1]} and {reference.shape[1]}",
                        hint="the baseline is the model that was quantized; or leave --baseline out",
                    )
                baseline_nll += _nll(reference, targets)
                agreed += (log.argmax(-1) == reference.argmax(-1)).sum().item()
                kl[row] += F.kl_div(log, reference, reduction="none", log_target=True).sum(-1).double().sum().item()
        progress(f"scoring {tokens.source}", row + 1, windows)
    count = windows * (window - 1)
    worst = max(range(windows), key=kl.__getitem__)
    return Score(
        perplexity=_exp(nll / count),
        kl=None if baseline is None else math.fsum(kl) / count,
        worst_window=None if baseline is None else worst,
        worst_window_kl=None if baseline is None else kl[worst] / (window - 1),
        top1_agreement=None if baseline is None else agreed / count,
        baseline_perplexity=None if baseline is None else _exp(baseline_nll / count),
        windows=windows,
        window=window,
        sha256=tokens.sha256,
    )


def _nll(log: Tensor, targets: Tensor) -> float:
    """Summed over tokens."""
    return float(F.nll_loss(log, targets.to(log.device), reduction="none").double().sum())


def _log_probabilities(run: Run, hidden: Tensor) -> Tensor:
    """Last hidden states of some positions of a window, `[positions, hidden]` -> `[positions, vocab]`, float32.

    Final norm and head look at one position at a time, so that a window need not be whole.
    """
    logits = run.stream.logits(hidden[None])[0].float()
    if not bool(logits.isfinite().all()):
        raise VerificationError(
            f"{run.name}: its logits hold NaN or infinity",
            hint="use --dtype float32; if it stays, the model is broken",
        )
    return logits.log_softmax(-1)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

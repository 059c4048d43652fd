"""Perplexity of a model, and its predictions against a baseline's, from the final hidden states of both."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from qcli.data.tokens import Tokens
from qcli.evaluation.final_states import FinalStates
from qcli.evaluation.results import Score
from qcli.utils.errors import UsageError, VerificationError
from qcli.utils.progress import Progress

_LOGITS = 1 << 25  # logits in memory at a time, per model


def score(tokens: Tokens, model: FinalStates, baseline: FinalStates | None, progress: Progress) -> Score:
    """Score the predictions on one text, window by window; sums over tokens are float64.

    Raises:
        UsageError: the models have different vocabularies.
        VerificationError: logits are not finite.
    """
    windows, window = tokens.ids.shape
    first = max(0, tokens.begin - 1)  # the position from which text is predicted
    positions = _LOGITS // model.stream.config.get_text_config().vocab_size
    hidden = model.windows(tokens.name)
    baseline_hidden = [] if baseline is None else baseline.windows(tokens.name)
    nll = baseline_nll = agreements = 0.0
    kl = [0.0] * windows
    for row in range(windows):
        for start in range(first, window - 1, positions):
            stop = min(start + positions, window - 1)
            targets = tokens.ids[row, start + 1 : stop + 1]
            log = _log_probabilities(model, hidden[row][start:stop])
            nll += _nll(log, targets)
            if baseline is not None:
                reference = _log_probabilities(baseline, baseline_hidden[row][start:stop])
                if log.shape != reference.shape:
                    raise UsageError(
                        f"{model.name} has a vocabulary of {log.shape[1]}, the baseline one of {reference.shape[1]}",
                        hint="use the model that was quantized as --baseline, or none",
                    )
                baseline_nll += _nll(reference, targets)
                agreements += (log.argmax(-1) == reference.argmax(-1)).sum().item()
                kl[row] += F.kl_div(log, reference, reduction="none", log_target=True).sum(-1).double().sum().item()
        progress(f"scoring {tokens.name}", row + 1, windows)
    predicted = window - 1 - first
    count = windows * predicted
    worst = max(range(windows), key=kl.__getitem__)
    return Score(
        perplexity=_exp(nll / count),
        kl=None if baseline is None else math.fsum(kl) / count,
        worst_window=None if baseline is None else worst,
        worst_window_kl=None if baseline is None else kl[worst] / predicted,
        top1_agreement=None if baseline is None else agreements / count,
        baseline_perplexity=None if baseline is None else _exp(baseline_nll / count),
        windows=windows,
        window=window,
        sha256=tokens.sha256,
        begin=tokens.begin,
    )


def _nll(log: Tensor, targets: Tensor) -> float:
    """Summed over tokens."""
    return float(F.nll_loss(log, targets.to(log.device), reduction="none").double().sum())


def _log_probabilities(model: FinalStates, hidden: Tensor) -> Tensor:
    """Final hidden states `[positions, hidden]` of a part of a window -> `[positions, vocab]`, float32.

    Final norm and head work position by position, so a window can be scored in parts.
    """
    logits = model.stream.logits(hidden[None])[0].float()
    if not bool(logits.isfinite().all()):
        raise VerificationError(
            f"{model.name}: its logits contain NaN or infinity",
            hint="use --dtype float32; if that does not help, the model is damaged",
        )
    return logits.log_softmax(-1)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

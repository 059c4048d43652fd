"""What was measured of a model, and on what."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qcli import __version__
from qcli.evaluation.layer_errors import BlockErrors
from qcli.evaluation.task_results import TaskResult
from qcli.utils.errors import UsageError
from qcli.utils.files import read_json


@dataclass(frozen=True)
class Score:
    """Loss on one data set. Every window predicts its tokens but the first, from those before them in it.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the predicted tokens.
        kl: mean over them of KL(baseline || model), in nats; None without a baseline.
        worst_window: the one with the highest mean, from 0. A mean over all windows hides that a model has failed in
            one of them.
        worst_window_kl: that mean.
        top1_agreement: share of them for which both models' likeliest token is the same.
        baseline_perplexity: the baseline's, on the same tokens.
        windows, window: number of windows, and tokens in each; they do not overlap and have no bos.
        sha256: of the windows' tokens.
    """

    perplexity: float
    kl: float | None
    worst_window: int | None
    worst_window_kl: float | None
    top1_agreement: float | None
    baseline_perplexity: float | None
    windows: int
    window: int
    sha256: str

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return self.windows * (self.window - 1)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, and on what.

    Attributes:
        scores: by data set, as the user named it.
        tasks, baseline_tasks: by name; both models answer the same questions.
        blocks: errors by block and layer on the first text, where asked for.
        fitted_to: texts of `scores` that the model was calibrated or distilled on: its losses there are too low.
        bits_per_weight: stored bits per weight of the quantized layers, tables included.
        linear_bits_per_weight: the same of all quantizable layers, those that stay dense included.
        model_bits_per_weight: the same of the whole model.
        bytes: of the files that hold the weights.
    """

    model: str
    baseline: str | None
    scores: dict[str, Score]
    tasks: dict[str, TaskResult]
    baseline_tasks: dict[str, TaskResult]
    blocks: list[BlockErrors] | None
    fitted_to: list[str]
    bits_per_weight: float
    linear_bits_per_weight: float
    model_bits_per_weight: float
    bytes: int
    device: str
    dtype: str

    @property
    def kl(self) -> float | None:
        """Mean over the tokens of all data sets of KL(baseline || model); None without a baseline."""
        return self._mean([score.kl for score in self.scores.values()])

    @property
    def worst_window_kl(self) -> float | None:
        """Of the window that lost most, in any data set; None without a baseline."""
        return max(
            (score.worst_window_kl for score in self.scores.values() if score.worst_window_kl is not None), default=None
        )

    @property
    def top1_agreement(self) -> float | None:
        """The same mean of the top-1 agreement."""
        return self._mean([score.top1_agreement for score in self.scores.values()])

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        import transformers

        baseline = None
        if self.baseline is not None:
            values = {data: _finite(score.baseline_perplexity) for data, score in self.scores.items()}
            baseline = {"model": self.baseline, "perplexity": values}
        return {
            "model": self.model,
            "perplexity": {data: _protocol(score) for data, score in self.scores.items()},
            "kl": _finite(self.kl),
            "worst_window_kl": _finite(self.worst_window_kl),
            "top1_agreement": self.top1_agreement,
            "baseline": baseline,
            "tasks": {name: self._task(name) for name in self.tasks},
            "blocks": None if self.blocks is None else [asdict(block) for block in self.blocks],
            "fitted_to": self.fitted_to,
            "bits_per_weight": self.bits_per_weight,
            "linear_bits_per_weight": self.linear_bits_per_weight,
            "model_bits_per_weight": self.model_bits_per_weight,
            "bytes": self.bytes,
            "device": self.device,
            "dtype": self.dtype,
            "versions": {
                "qcli": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    def _task(self, name: str) -> dict[str, Any]:
        before = self.baseline_tasks.get(name)
        return asdict(self.tasks[name]) | {"baseline": None if before is None else before.score}

    def _mean(self, values: list[float | None]) -> float | None:
        if self.baseline is None or not values:
            return None
        tokens = [score.tokens for score in self.scores.values()]
        return sum(value * n for value, n in zip(values, tokens, strict=True) if value is not None) / sum(tokens)


def _protocol(score: Score) -> dict[str, Any]:
    fields = asdict(score)
    del fields["baseline_perplexity"]
    fields |= {name: _finite(fields[name]) for name in ("kl", "worst_window_kl")}
    value = _finite(fields.pop("perplexity"))
    return {"value": value, "stride": score.window, "bos": False, "tokens": score.tokens, **fields}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


_MEASURED = {"perplexity", "kl", "worst_window_kl", "top1_agreement", "baseline", "tasks"}


def read_evaluation(file: Path, model: Path) -> dict[str, Any]:
    """What `qcli eval --json` has printed of a model.

    Raises:
        UsageError: the file is no such output, or is of other models.
    """
    try:
        found = read_json(file)
        models = [*found["models"]] if "models" in found else [found]
        names = [str(each["model"]) for each in models]
        if not all(each.keys() >= _MEASURED for each in models):  # of another command, as `inspect`
            raise KeyError
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{file} is not what `qcli eval --json` prints") from None
    for name, each in zip(names, models, strict=True):
        if Path(name).resolve() == model.resolve():
            return dict(each)
    raise UsageError(f"{file} is an evaluation of {', '.join(names)}", hint=f"qcli eval {model} --json > {file}")

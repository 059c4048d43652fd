"""Results of an evaluation, and the protocol they were measured by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError, model_validator

from qcli import __version__
from qcli.evaluation.layer_errors import BlockErrors
from qcli.evaluation.severity import kl_word
from qcli.evaluation.task_results import TaskResult
from qcli.utils.errors import UsageError
from qcli.utils.files import read_json
from qcli.utils.paths import portable_name


@dataclass(frozen=True)
class Score:
    """Loss on one text. In every window all tokens but the first and begin tokens are predicted, from those before.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the predicted tokens.
        kl: mean of KL(baseline || model) over the predicted tokens, in nats; None without a baseline.
        worst_window: index of the window with the highest mean KL: a mean over all windows hides a model that fails
            in one of them.
        worst_window_kl: mean KL of that window.
        top1_agreement: fraction of predicted tokens for which both models rank the same token first.
        baseline_perplexity: the baseline's, on the same tokens.
        windows, window: number of windows, and tokens in each; they do not overlap.
        begin: how many of each window's tokens are begin tokens, before its text; none of them is predicted.
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
    begin: int = 0

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return self.windows * (self.window - max(1, self.begin))


@dataclass(frozen=True)
class Evaluation:
    """Everything that `evaluate` measured of a model.

    Attributes:
        scores: by text, as the user named it.
        tasks, baseline_tasks: by name; both models answer the same questions.
        blocks: errors by block and layer on the first text, if requested.
        fitted_to: texts of `scores` that the model was calibrated or distilled on: its losses there are too low.
        bits_per_weight: stored bits per weight of the quantized layers, tables included.
        linear_bits_per_weight: the same for all quantizable layers, dense ones included.
        model_bits_per_weight: the same for the whole model.
        bytes: size of the weight files.
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
        """Mean of KL(baseline || model) over the tokens of all texts; None without a baseline."""
        return self._mean([score.kl for score in self.scores.values()])

    @property
    def worst_window_kl(self) -> float | None:
        """Mean KL of the worst window of all texts; None without a baseline."""
        return max(
            (score.worst_window_kl for score in self.scores.values() if score.worst_window_kl is not None), default=None
        )

    @property
    def top1_agreement(self) -> float | None:
        """Top-1 agreement over the tokens of all texts; None without a baseline."""
        return self._mean([score.top1_agreement for score in self.scores.values()])

    def to_json(self) -> dict[str, Any]:
        """The result as plain data that JSON can hold."""
        import transformers

        baseline = None
        if self.baseline is not None:
            values = {data: _finite(score.baseline_perplexity) for data, score in self.scores.items()}
            baseline = {"model": self.baseline, "perplexity": values}
        return {
            "model": self.model,
            "perplexity": {data: _protocol(score) for data, score in self.scores.items()},
            "kl": _finite(self.kl),
            "kl_word": None if self.kl is None else kl_word(self.kl),
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
        baseline = self.baseline_tasks.get(name)
        return asdict(self.tasks[name]) | {"baseline": None if baseline is None else baseline.score}

    def _mean(self, values: list[float | None]) -> float | None:
        if self.baseline is None or not values:
            return None
        tokens = [score.tokens for score in self.scores.values()]
        return sum(value * n for value, n in zip(values, tokens, strict=True) if value is not None) / sum(tokens)


def _protocol(score: Score) -> dict[str, Any]:
    fields = asdict(score)
    del fields["baseline_perplexity"]
    fields |= {name: _finite(fields[name]) for name in ("kl", "worst_window_kl")}
    value, bos = _finite(fields.pop("perplexity")), fields.pop("begin") > 0
    stride = score.window - score.begin  # in the text
    return {"value": value, "stride": stride, "bos": bos, "tokens": score.tokens, **fields}


def portable(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation, as `Evaluation.to_json` returns it, that is the same on every machine: names in place of paths.

    The hash of a text's tokens is among its fields; texts of the same name have a part of it in their names, too.
    """
    titles = {data: portable_name(data) for data in evaluation["perplexity"]}
    shared = {name for name, times in Counter(titles.values()).items() if times > 1}
    for data, score in evaluation["perplexity"].items():
        if titles[data] in shared:
            titles[data] = f"{titles[data]} ({score['sha256'][:8]})"
    fields = {
        "model": portable_name(evaluation["model"]),
        "perplexity": {titles[data]: score for data, score in evaluation["perplexity"].items()},
        "fitted_to": [titles.get(data, portable_name(data)) for data in evaluation["fitted_to"]],
    }
    if (baseline := evaluation["baseline"]) is not None:
        values = {titles[data]: value for data, value in baseline["perplexity"].items()}
        fields["baseline"] = {"model": portable_name(baseline["model"]), "perplexity": values}
    return {**evaluation, **fields}


def _finite(value: float | None) -> float | None:
    """None for infinity and NaN, which JSON lacks."""
    return value if value is not None and math.isfinite(value) else None


class _Perplexity(BaseModel):
    value: float | None
    windows: int
    window: int


class _Task(BaseModel):
    metric: str
    score: float | None
    baseline: float | None
    samples: int


class _Baseline(BaseModel):
    perplexity: dict[str, float | None]


class _Output(BaseModel):
    """What of `Evaluation.to_json` later commands read."""

    perplexity: dict[str, _Perplexity]
    kl: float | None
    worst_window_kl: float | None
    top1_agreement: float | None
    baseline: _Baseline | None
    tasks: dict[str, _Task]
    fitted_to: list[str] = []  # evaluations of earlier versions have none

    @model_validator(mode="after")
    def _complete(self) -> _Output:
        if self.kl is not None and (self.worst_window_kl is None or self.top1_agreement is None):
            raise ValueError("kl comes with worst_window_kl and top1_agreement")
        if self.baseline is not None and self.perplexity.keys() - self.baseline.perplexity.keys():
            raise ValueError("baseline has no perplexity of a text")
        return self


_KEYS = {"perplexity", "kl", "worst_window_kl", "top1_agreement", "baseline", "tasks"}


def _require_types(file: Path, evaluation: Any) -> None:
    try:
        _Output.model_validate(evaluation, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise UsageError(f"{file} is not the output of `qcli eval --json`: {reason}") from None


def read_evaluation(file: Path, model: Path) -> dict[str, Any]:
    """The evaluation of `model` in a file that holds the output of `qcli eval --json`.

    Raises:
        UsageError: the file holds something else, or evaluations of other models only.
    """
    try:
        output = read_json(file)
        models = [*output["models"]] if "models" in output else [output]
        names = [str(each["model"]) for each in models]
        places = [{Path(name).resolve(), (file.parent / name).resolve()} for name in names]  # `run` writes names
        if not all(each.keys() >= _KEYS for each in models):  # output of another command, such as `inspect`
            raise KeyError
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{file} is not the output of `qcli eval --json`") from None
    for place, each in zip(places, models, strict=True):
        if model.resolve() in place:
            _require_types(file, each)
            return dict(each)
    raise UsageError(
        f"{file} is an evaluation of {', '.join(names)}, not of {model}", hint=f"qcli eval {model} --json > {file}"
    )

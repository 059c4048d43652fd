"""Quality of models: perplexity, tasks, and KL divergence and top-1 agreement against a baseline.

Models run block by block over all windows, so a model may be larger than memory: what is held is one block, the
hidden states, and the logits of a few hundred positions. Only tasks need a model in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from qcli.data.datasets import is_folder
from qcli.data.default_text import named
from qcli.data.identity import text_identity
from qcli.data.names import SELF
from qcli.data.source import label
from qcli.data.tokens import Tokens
from qcli.evaluation.contamination import require_unseen, seen_texts
from qcli.evaluation.final_states import FinalStates, final_states, model_key
from qcli.evaluation.layer_errors import BlockErrors, layer_errors
from qcli.evaluation.options import EvalOptions
from qcli.evaluation.results import Evaluation
from qcli.evaluation.scoring import score
from qcli.evaluation.task_results import TaskResult
from qcli.evaluation.windows import evaluation_windows, require_memory
from qcli.models.open import ModelSource, open_source
from qcli.models.stream import ModelStream, batches
from qcli.utils.cache import Cache
from qcli.utils.device import matmul_precision, resolve_device, resolve_dtype
from qcli.utils.errors import UsageError
from qcli.utils.progress import Progress, silent


def evaluate(
    model: str,
    options: EvalOptions,
    *,
    baseline: str | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Measure one model; see `compare`."""
    (evaluation,) = compare([model], options, baseline=baseline, cache=cache, progress=progress)
    return evaluation


def compare(
    models: Sequence[str],
    options: EvalOptions,
    *,
    baseline: str | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> list[Evaluation]:
    """Measure models on the same texts, one after another; the baseline runs once.

    Args:
        models, baseline: a folder, a `.gguf` file or a hub id each.
        cache: keeps what the baseline gives; None: nothing is kept.

    Raises:
        UsageError: no such model or text, a text that is too short or that a model was calibrated on, or models and
            baseline do not share a vocabulary.
        ResourceError: the hidden states of all windows, or a block, do not fit in memory.
        VerificationError: a checkpoint is damaged, or a model's logits are not finite.
    """
    device, dtype = resolve_device(options.device), resolve_dtype(options.dtype)
    nothing, kept = Cache(None), cache or Cache(None)
    sources, reference = _opened(models, options, baseline, progress)
    options = replace(options, texts=[named(text) if isinstance(text, str) else text for text in options.texts])
    identities = {label(text): text_identity(text, calibration=False) for text in options.texts}
    windows = evaluation_windows(options, [*sources, *([reference] if reference is not None else [])], kept, progress)
    require_memory(windows, sources, reference, dtype, options)
    run = _Evaluator(options, windows, device, dtype, progress)
    evaluations = []
    with matmul_precision(fast=False), torch.inference_mode():
        expected = None if reference is None else run.final_states(str(baseline), reference, kept)
        baseline_tasks = {} if reference is None else run.tasks(str(baseline), reference, kept)
        for name, source in zip(models, sources, strict=True):
            states = run.final_states(name, source, nothing)
            evaluation = Evaluation(
                model=name,
                baseline=baseline,
                scores={tokens.name: score(tokens, states, expected, progress) for tokens in windows},
                tasks={},
                baseline_tasks=baseline_tasks,
                blocks=None,
                fitted_to=seen_texts(source, identities),
                bits_per_weight=source.bits_per_weight(),
                linear_bits_per_weight=source.linear_bits_per_weight(),
                model_bits_per_weight=source.model_bits_per_weight(),
                bytes=source.bytes(),
                device=str(device),
                dtype=str(dtype).removeprefix("torch."),
            )
            del states  # frees the memory that tasks need
            blocks = run.layer_errors(source, reference) if options.layers and reference is not None else None
            evaluations.append(replace(evaluation, tasks=run.tasks(name, source, nothing), blocks=blocks))
    return evaluations


def plan_evaluation(
    models: Sequence[str],
    options: EvalOptions,
    *,
    baseline: str | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Check what `compare` checks before it runs a model, and tell what it would do, as plain data.

    A text that is sampled from a model is not known before it runs: its `windows` are None.

    Raises:
        QcliError: as `compare`.
    """
    sources, reference = _opened(models, options, baseline, progress)
    options = replace(options, texts=[named(text) if isinstance(text, str) else text for text in options.texts])
    everything = [*sources, *([reference] if reference is not None else [])]
    read = replace(options, texts=[text for text in options.texts if text != SELF])
    windows = evaluation_windows(read, everything, cache or Cache(None), progress)
    placement = require_memory(windows, sources, reference, resolve_dtype(options.dtype), options)
    shapes = {tokens.name: tokens.ids.shape for tokens in windows}
    return {
        "models": [
            {
                "model": name,
                "baseline": source is reference,
                "bits_per_weight": source.bits_per_weight(),
                "model_bits_per_weight": source.model_bits_per_weight(),
                "bytes": source.bytes(),
            }
            for name, source in zip([*models, *([baseline] if baseline is not None else [])], everything, strict=True)
        ],
        "texts": [
            {"text": text, "windows": shapes[text][0], "window": shapes[text][1]}
            if text in shapes
            else {"text": text, "windows": None, "window": None}
            for text in dict.fromkeys(map(label, options.texts))
        ],
        "tasks": [] if options.tasks is None else list(options.tasks.names),
        "memory": None if placement is None else placement.to_json(),
    }


def _opened(
    models: Sequence[str], options: EvalOptions, baseline: str | None, progress: Progress
) -> tuple[list[ModelSource], ModelSource | None]:
    """The models and the baseline, which can be compared on the texts."""
    _require_consistent(models, options, baseline)
    progress("reading the models", 0, 0)
    sources = [open_source(name, options.trust) for name in models]
    reference = None if baseline is None else open_source(baseline, options.trust)
    for folder in filter(is_folder, options.texts):
        for source in sources:
            require_unseen(folder, source)
    if options.layers and reference is not None:
        _require_same_layers(sources, reference)
    return sources, reference


@dataclass(frozen=True)
class _Evaluator:
    """What every model of a comparison is put through."""

    options: EvalOptions
    windows: Sequence[Tokens]
    device: torch.device
    dtype: torch.dtype
    progress: Progress

    def final_states(self, name: str, source: ModelSource, cache: Cache) -> FinalStates:
        return final_states(name, self._stream(source), self.windows, cache, self.progress)

    def tasks(self, name: str, source: ModelSource, cache: Cache) -> dict[str, TaskResult]:
        tasks = self.options.tasks
        if tasks is None:
            return {}

        def results() -> dict[str, object]:
            measured = tasks.run(name, source, self.device, self.dtype, self.progress, self.options.bos)
            return {task: asdict(result) for task, result in measured.items()}

        tokenizer = source.tokenizer_content() if cache.folder is not None else None
        inputs = {"bos": self.options.bos, "tokenizer": tokenizer}
        key = {**tasks.key, **inputs, **model_key(source, self.device, self.dtype, cache)}
        return {task: TaskResult(**result) for task, result in cache.values(key, results).items()}

    def layer_errors(self, source: ModelSource, baseline: ModelSource) -> list[BlockErrors]:
        first = batches(self.windows[0].ids)
        return layer_errors(self._stream(source), self._stream(baseline), first, self.progress)

    def _stream(self, source: ModelSource) -> ModelStream:
        return ModelStream(source, device=self.device, dtype=self.dtype)


def _require_consistent(models: Sequence[str], options: EvalOptions, baseline: str | None) -> None:
    if not options.texts and options.tasks is None:
        raise UsageError("no text to evaluate on", hint="--data wikitext2, a file, or `self`")
    if options.layers and (baseline is None or not options.texts):
        raise UsageError("layer errors are measured against a baseline on text", hint="--baseline MODEL --data TEXT")
    if SELF in options.texts and baseline is None and len(models) > 1:
        raise UsageError(
            "data self: each model would be evaluated on a text of its own",
            hint="--baseline MODEL: all are evaluated on text sampled from it",
        )


def _require_same_layers(sources: Sequence[ModelSource], baseline: ModelSource) -> None:
    for source in sources:
        if source.linears() != baseline.linears():
            raise UsageError(
                f"{source.path} and {baseline.path} have different layers: their outputs cannot be compared",
                hint="use the model that was quantized as --baseline, or leave --layers out",
            )

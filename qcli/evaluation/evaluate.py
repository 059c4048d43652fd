"""How much a model lost: perplexity, and KL divergence and top-1 agreement against a baseline.

Both models run block by block over all windows, so a model larger than memory evaluates: what is held is one
block, the hidden states, and the logits of a few hundred positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from qcli.data.datasets import NAMED, SELF, is_folder
from qcli.data.tokens import Tokens, calibration_tokens, content_key, context_length, evaluation_tokens, text_identity
from qcli.evaluation.layer_errors import layer_errors
from qcli.evaluation.results import Evaluation
from qcli.evaluation.scoring import Run, score
from qcli.evaluation.tasks import TaskResult, Tasks
from qcli.models.manifest import MANIFEST, Manifest, versions
from qcli.models.open import Source, open_source
from qcli.models.stream import ModelStream, batches
from qcli.utils.cache import Cache
from qcli.utils.device import matmul_precision, resolve_device, resolve_dtype
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.memory import free_memory
from qcli.utils.progress import Progress, silent

_WINDOW = 2048


def evaluate(
    model: str,
    *,
    baseline: str | None = None,
    data: Sequence[str],
    window: int | None = None,
    max_windows: int | None = None,
    tasks: Tasks | None = None,
    layers: bool = False,
    cache: Cache | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> Evaluation:
    """Measure one model; see `compare`."""
    (found,) = compare(
        [model],
        baseline=baseline,
        data=data,
        window=window,
        max_windows=max_windows,
        tasks=tasks,
        layers=layers,
        cache=cache,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    return found


def compare(
    models: Sequence[str],
    *,
    baseline: str | None = None,
    data: Sequence[str],
    window: int | None = None,
    max_windows: int | None = None,
    tasks: Tasks | None = None,
    layers: bool = False,
    cache: Cache | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
) -> list[Evaluation]:
    """Measure models on the same text, one after another; the baseline runs once.

    Args:
        models, baseline: a folder, a `.gguf` file or a hub id each.
        data: as `evaluation_tokens` takes it; `self` is text sampled from the baseline, or if there is none from the
            only model.
        window: tokens per window; by default 2048, or the models' context if that is shorter.
        max_windows: of each data set, use only the first ones.
        tasks: what each model is asked besides, whole in memory.
        layers: find the error of every block and layer against the baseline, on the first text.
        dtype: of weights and activations; `auto` is float32, with exact matrix products.
        cache: keeps what the baseline gives.

    Raises:
        UsageError: no such model or data, text too short or that of a model's calibration, or models and baseline
            do not share a vocabulary.
        ResourceError: the hidden states of all windows do not fit the memory.
        VerificationError: a checkpoint is damaged, or a model's logits are not finite.
    """
    if not data and tasks is None:
        raise UsageError("no data to evaluate on", hint="--data wikitext2, a file, or `self`")
    if layers and (baseline is None or not data):
        raise UsageError("errors by layer compare with a baseline on text", hint="--baseline MODEL --data SRC")
    if SELF in data and baseline is None and len(models) > 1:
        raise UsageError("data self: each model would write its own text", hint="--baseline MODEL writes it for all")
    where, precision = resolve_device(device), resolve_dtype(dtype)
    sources = [open_source(name) for name in models]
    reference = None if baseline is None else open_source(baseline)
    everything = [*sources, reference] if reference is not None else sources
    for folder in filter(is_folder, data):
        for source in sources:
            _refuse_seen(folder, source)
    if layers and reference is not None:
        _require_same_layers(sources, reference)
    none, kept = Cache(None), cache or Cache(None)
    texts = {name: None if name in NAMED else text_identity(name) for name in data}  # sets have parts for each use
    sets = windows_of(data, everything, window, max_windows, where, kept, progress)
    _check_memory(sets, sources, reference, precision)

    with matmul_precision(fast=False), torch.inference_mode():

        def run(name: str, source: Source, keep: Cache) -> Run:
            stream = ModelStream(source, device=where, dtype=precision)
            key = {"last_hidden": [tokens.sha256 for tokens in sets], **_key(source, where, precision, keep)}
            states = keep.tensors(key, lambda: _run_blocks(stream, sets, f"evaluating {name}", progress))
            numbered = [range(len(batches(tokens.ids))) for tokens in sets]
            return Run(name, stream, [[states[f"{i}.{batch}"] for batch in n] for i, n in enumerate(numbered)])

        def ask(name: str, source: Source, keep: Cache) -> dict[str, TaskResult]:
            if tasks is None:
                return {}
            key = {**tasks.key, **_key(source, where, precision, keep)}
            results = keep.values(key, lambda: _plain(tasks.run(name, where, precision, progress)))
            return {task: TaskResult(**result) for task, result in results.items()}

        against = None if reference is None else run(str(baseline), reference, kept)
        baseline_tasks = {} if reference is None else ask(str(baseline), reference, kept)
        found = []
        for name, source in zip(models, sources, strict=True):
            own = run(name, source, none)
            found.append(
                Evaluation(
                    model=name,
                    baseline=baseline,
                    scores={tokens.source: score(tokens, i, own, against, progress) for i, tokens in enumerate(sets)},
                    tasks={},
                    baseline_tasks=baseline_tasks,
                    blocks=None,
                    fitted_to=_fitted_to(source, texts),
                    bits_per_weight=source.bits_per_weight(),
                    linear_bits_per_weight=source.linear_bits_per_weight(),
                    model_bits_per_weight=source.model_bits_per_weight(),
                    bytes=source.bytes(),
                    device=str(where),
                    dtype=str(precision).removeprefix("torch."),
                )
            )
            del own  # its hidden states, before tasks need the memory
            blocks = None
            if layers and reference is not None:
                both = [ModelStream(each, device=where, dtype=precision) for each in (source, reference)]
                blocks = layer_errors(both[0], both[1], batches(sets[0].ids), progress)
            found[-1] = replace(found[-1], tasks=ask(name, source, none), blocks=blocks)
    return found


def windows_of(
    data: Sequence[str],
    sources: Sequence[Source],
    window: int | None,
    max_windows: int | None,
    device: torch.device,
    cache: Cache,
    progress: Progress,
) -> list[Tokens]:
    """What `compare` measures `sources`, the last one the baseline if there is one, on.

    Raises:
        UsageError: no such data, text too short, or the models have different tokenizers.
    """
    length = min([window or _WINDOW, *(_context(source) for source in sources if window is None)])
    return [_tokens(name, sources, length, max_windows, device, cache, progress) for name in dict.fromkeys(data)]


def _context(source: Source) -> int:
    return context_length(source.config) or _WINDOW


def _require_same_layers(sources: Sequence[Source], baseline: Source) -> None:
    for source in sources:
        if source.linears() != baseline.linears():
            raise UsageError(
                f"{source.path} and {baseline.path} have different layers: there are no errors by layer",
                hint="the baseline is the model that was quantized; or leave --layers out",
            )


def _refuse_seen(folder: str, source: Source) -> None:
    """A folder of `qcli calibrate` may hold the very tokens that a checkpoint was calibrated or distilled on."""
    if not (source.path / MANIFEST).is_file():
        return
    manifest = Manifest.read(source.path)
    seen = [("calibrated", manifest.calibration_tokens_sha256)]
    seen += [("distilled", report.tokens_sha256) for report in manifest.distilled]
    found = calibration_tokens(folder, source, samples=1, seq_len=2, seed=0).sha256
    for how in (how for how, tokens in seen if tokens == found):
        raise UsageError(
            f"{source.path} was {how} on {folder}: it must be evaluated on other text",
            hint="for another folder: qcli calibrate --seed 1",
        )


def _fitted_to(source: Source, texts: Mapping[str, str | None]) -> list[str]:
    """Those of the texts, identities by name, that a checkpoint was calibrated or distilled on."""
    if not (source.path / MANIFEST).is_file():
        return []
    manifest = Manifest.read(source.path)
    seen = {manifest.calibration_text_identity}
    seen |= {report.text_identity for report in manifest.distilled}
    return [data for data, text in texts.items() if text is not None and text in seen]


def _check_memory(sets: list[Tokens], sources: list[Source], baseline: Source | None, dtype: torch.dtype) -> None:
    """What is held of every window until it is scored: its last hidden states, in one model and the baseline."""
    positions = sum(tokens.ids.numel() for tokens in sets)
    widths = max(_width(source) for source in sources) + (0 if baseline is None else _width(baseline))
    needed, free = positions * widths * dtype.itemsize, free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise ResourceError(
            f"the hidden states of {positions} tokens take {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free",
            hint="use fewer: --max-windows N",
        )


def _width(source: Source) -> int:
    return int(source.hf_config().get_text_config().hidden_size)


def _tokens(
    data: str,
    sources: Sequence[Source],
    window: int,
    max_windows: int | None,
    device: torch.device,
    cache: Cache,
    progress: Progress,
) -> Tokens:
    """Windows of a data set, which must be the same for all models."""

    def of(source: Source) -> Tokens:
        def make() -> dict[str, Tensor]:
            found = evaluation_tokens(
                data, source, window=window, max_windows=max_windows, device=device, progress=progress
            )
            return {"ids": found.ids}

        if cache.folder is None or is_folder(data):
            return Tokens(make()["ids"], data)
        key = {"evaluation": [window, max_windows], "device": device.type, **content_key(data, source), **versions()}
        return Tokens(cache.tensors(key, make)["ids"], data)

    tokens = [of(source) for source in (sources[-1:] if data == SELF else sources)]
    if len({each.sha256 for each in tokens}) > 1:
        raise UsageError(
            "the models have different tokenizers: their predictions cannot be compared",
            hint="the baseline is the model that was quantized; or leave --baseline out",
        )
    return tokens[0]


def _key(source: Source, device: torch.device, dtype: torch.dtype, cache: Cache) -> dict[str, Any]:
    """What decides what a model gives; its files are read whole only if anything is kept."""
    content = source.content() if cache.folder is not None else None
    return {"model": content, "device": device.type, "dtype": str(dtype), **versions()}


def _plain(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    return {task: asdict(result) for task, result in results.items()}


def _run_blocks(stream: ModelStream, sets: list[Tokens], stage: str, progress: Progress) -> dict[str, Tensor]:
    """Hidden states after the last block, on the CPU, as `SET.BATCH`."""
    if not sets:
        return {}
    progress(stage, 0, stream.n_blocks)
    names = [f"{i}.{batch}" for i, tokens in enumerate(sets) for batch in range(len(batches(tokens.ids)))]
    hidden = [stream.embed(batch).cpu() for tokens in sets for batch in batches(tokens.ids)]
    for index in range(stream.n_blocks):
        stream.advance(stream.load_block(index), index, hidden)
        progress(stage, index + 1, stream.n_blocks)
    return dict(zip(names, hidden, strict=True))

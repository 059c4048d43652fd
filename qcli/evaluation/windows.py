"""The token windows that models are compared on, and whether their hidden states fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qcli.data.datasets import is_folder
from qcli.data.default_text import named
from qcli.data.names import SELF
from qcli.data.source import TextSource
from qcli.data.stored_windows import stored_windows
from qcli.data.tokens import Tokens, evaluation_tokens
from qcli.evaluation.options import DEFAULT_WINDOW, EvalOptions
from qcli.models.open import ModelSource
from qcli.models.sizes import ModelSizes, pass_tokens
from qcli.utils.cache import Cache
from qcli.utils.device import resolve_device
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.memory import free_memory
from qcli.utils.placement import RUNTIME, Peak, Placement, limit_memory, place
from qcli.utils.progress import Progress


def evaluation_windows(
    options: EvalOptions, sources: Sequence[ModelSource], cache: Cache, progress: Progress
) -> list[Tokens]:
    """The windows of each text, which are the same for all models.

    Args:
        sources: the models, the baseline last if there is one.

    Raises:
        UsageError: no such text, too short, or the models' tokenizers differ.
    """
    length = options.window
    if length is None:
        length = min([DEFAULT_WINDOW, *(source.context_length or DEFAULT_WINDOW for source in sources)])
    windows = []
    for data in dict.fromkeys(named(text) if isinstance(text, str) else text for text in options.texts):
        own = stored_windows(Path(data)) if is_folder(data) and options.window is None else None
        windows.append(_windows(data, min(length, own[1]) if own else length, options, sources, cache, progress))
    return windows


def _windows(
    data: str | TextSource,
    length: int,
    options: EvalOptions,
    sources: Sequence[ModelSource],
    cache: Cache,
    progress: Progress,
) -> Tokens:
    tokens = [
        evaluation_tokens(
            data,
            source,
            window=length,
            max_windows=options.max_windows,
            bos=options.bos,
            device=resolve_device(options.device),
            cache=cache,
            progress=progress,
        )
        for source in (sources[-1:] if data == SELF else sources)
    ]
    if len({each.sha256 for each in tokens}) > 1:
        raise UsageError(
            "the models have different tokenizers: their predictions cannot be compared",
            hint="use the model that was quantized as --baseline, or none",
        )
    return tokens[0]


def require_memory(
    windows: Sequence[Tokens],
    sources: Sequence[ModelSource],
    baseline: ModelSource | None,
    dtype: torch.dtype,
    options: EvalOptions,
) -> Placement | None:
    """Check that the final hidden states of all windows fit in memory, those of one model and of the baseline, and what
    computes them on the device; returns where. None: there are no windows.

    Raises:
        ResourceError: they do not.
    """
    if not windows:
        return None
    positions = sum(tokens.ids.numel() for tokens in windows)
    width = max(_hidden_size(source) for source in sources) + (0 if baseline is None else _hidden_size(baseline))
    needed, free = positions * width * dtype.itemsize, free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise ResourceError(
            f"the hidden states of {positions} tokens need {needed / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free",
            hint="evaluate fewer windows: --max-windows N",
        )
    device, sizes = resolve_device(options.device), [ModelSizes.of(source) for source in sources]
    reference = [] if baseline is None else [ModelSizes.of(baseline)]
    outside = max(size.outside for size in sizes) + sum(size.outside for size in reference)
    block = max(size.block for size in [*sizes, *reference]) * (2 if options.layers else 1)
    tokens = max(pass_tokens(*each.ids.shape) for each in windows)
    work = max(size.forward(tokens, dtype.itemsize) for size in [*sizes, *reference])
    peak = Peak(RUNTIME)
    peak.add(device=dtype.itemsize * (outside + block) + work, host=needed)
    placement = place(peak.demand(waiting=0), device, options.max_memory, "evaluating these models")
    placement.require("a shorter --window, --dtype bfloat16, --device cpu, or another --max-memory")
    limit_memory(device, options.max_memory)
    return placement


def _hidden_size(source: ModelSource) -> int:
    return source.family.passing.width(int(source.hf_config().get_text_config().hidden_size))

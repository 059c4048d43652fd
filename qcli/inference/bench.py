"""Speed and memory of whole models: prefill, decode and load, of one model or of two in turns."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from inspect import signature
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qcli.inference.load import backend_counts, load_model, tensor_bytes
from qcli.inference.served import own_dtype
from qcli.inference.timing import load_average, seconds
from qcli.models.kv_cache import empty_cache
from qcli.models.open import open_source
from qcli.models.source import ModelSource
from qcli.utils.device import resolve_device, resolve_dtype
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.memory import peak_memory
from qcli.utils.progress import Progress, silent
from qcli.utils.trust import NOTHING, Trust


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        batches: numbers of sequences at once.
        contexts: tokens of each sequence before the new ones.
        new_tokens: decoded after each context.
        rounds: repetitions, of which medians are reported.
        device, dtype: names, as for `resolve_device` and `resolve_dtype`; `auto` is the checkpoint's own dtype.
        trust: whether Python files of the models may run.
    """

    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128,)
    new_tokens: int = 32
    rounds: int = 5
    device: str = "auto"
    dtype: str = "auto"
    trust: Trust = NOTHING


@dataclass(frozen=True)
class Speed:
    """One model at one batch size and context.

    Attributes:
        prefill_tokens_per_second: of all sequences together, as is the next.
        decode_tokens_per_second: of the tokens after the first.
        first_token_seconds: from the contexts' tokens to the first new ones.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float


def bench(model: str, baseline: str | None, options: BenchOptions, progress: Progress = silent) -> dict[str, Any]:
    """Measure a model, in turns with a baseline: speeds of each, and medians of the ratios of each round.

    Memory is that of a process of its own for each.

    Raises:
        UsageError: no such model, or a context that one of them does not have.
        ResourceError: they do not fit in memory together.
    """
    names = [model] if baseline is None else [model, baseline]
    sources = [open_source(name, options.trust) for name in names]
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, own_dtype(sources[0], device))
    _require_contexts(sources, options)
    before = load_average()
    memory = []
    for index, name in enumerate(names):
        progress("memory, in processes of their own", index, len(names))
        memory.append(_alone(name, options, dtype))
    progress("memory, in processes of their own", len(names), len(names))
    arms = [_Arm(source, load_model(source, device, dtype, progress), device) for source in sources]
    vocabulary = min(arm.vocabulary for arm in arms)
    points: list[dict[str, Any]] = []
    shapes = [(batch, context) for batch in options.batches for context in options.contexts]
    for number, (batch, context) in enumerate(shapes):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (batch, context), generator=generator).to(device)
        rounds: list[list[Speed]] = []
        for count in range(-1, options.rounds):  # the first is not counted
            progress("measuring", number * options.rounds + max(count, 0), len(shapes) * options.rounds)
            speeds = [arm.measure(ids, options.new_tokens if count >= 0 else 2) for arm in arms]
            rounds += [speeds] if count >= 0 else []
        points.append({"batch": batch, "context": context, **_medians(rounds)})
    progress("measuring", len(shapes) * options.rounds, len(shapes) * options.rounds)
    both = [
        {"name": name, **held, "backends": backend_counts(arm.model, device, dtype)}
        for name, held, arm in zip(names, memory, arms, strict=True)
    ]
    return {
        "model": both[0],
        "baseline": both[1] if baseline is not None else None,
        "points": points,
        "rounds": options.rounds,
        "new_tokens": options.new_tokens,
        **setting(device, dtype),
        "load_average": [before, load_average()],
    }


def setting(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where something was measured, as plain data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": str(device),
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


class _Arm:
    """A loaded model, and how it is timed."""

    def __init__(self, source: ModelSource, model: Any, device: torch.device) -> None:
        self.model, self._device, self._blocks = model, device, source.n_blocks
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}

    @torch.inference_mode()
    def measure(self, ids: Tensor, new_tokens: int) -> Speed:
        """Prefill int64 `[batch, context]`, then decode greedily, the end of text or not."""
        batch, context = ids.shape
        cache = empty_cache(self._blocks, context + new_tokens)
        tokens = ids

        def step() -> None:
            nonlocal tokens
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **self._last_only)
            tokens = output.logits[:, -1:].argmax(-1)

        def decode() -> None:
            for _ in range(new_tokens - 1):
                step()

        first, rest = seconds(step, self._device), seconds(decode, self._device)
        return Speed(batch * context / first, batch * (new_tokens - 1) / rest, first)


def _medians(rounds: Sequence[Sequence[Speed]]) -> dict[str, Any]:
    """Of each arm, and of the ratios of the first to the second within a round."""

    names = list(asdict(rounds[0][0]))
    values = [[asdict(speed) for speed in speeds] for speeds in rounds]
    arms = [{name: median(speeds[arm][name] for speeds in values) for name in names} for arm in range(len(values[0]))]
    if len(arms) == 1:
        return {"model": arms[0], "baseline": None, "ratio": None}
    ratios = {name: median(speeds[0][name] / speeds[1][name] for speeds in values) for name in names}
    return {"model": arms[0], "baseline": arms[1], "ratio": ratios}


def _require_contexts(sources: Sequence[ModelSource], options: BenchOptions) -> None:
    longest = max(options.contexts) + options.new_tokens
    for source in sources:
        if source.context_length is not None and longest > source.context_length:
            raise UsageError(
                f"{source.path}: {longest} tokens, the new ones included, exceed its context of "
                f"{source.context_length}",
                hint="a shorter --context",
            )


def _alone(model: str, options: BenchOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Memory and load time of a model in a process that has done nothing before."""
    context = multiprocessing.get_context("spawn")
    arguments = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=_start, initargs=arguments) as pool:
        try:
            return pool.submit(_memory, model, options, dtype).result()
        except BrokenProcessPool:
            raise ResourceError(f"{model}: a process that loaded it was killed, perhaps for its memory") from None
        except BaseException:  # interrupted
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    torch.set_num_threads(threads)


def _memory(model: str, options: BenchOptions, dtype: torch.dtype) -> dict[str, Any]:
    device, source = resolve_device(options.device), open_source(model, options.trust)
    empty = peak_memory(device)
    started = time.perf_counter()
    loaded = load_model(source, device, dtype)
    load_seconds = time.perf_counter() - started
    after_load = peak_memory(device)
    arm = _Arm(source, loaded, device)
    arm.measure(torch.zeros(max(options.batches), max(options.contexts), dtype=torch.int64, device=device), 2)
    return {
        "tensors": tensor_bytes(loaded),
        "load_seconds": load_seconds,
        "peak": {"before": empty, "load": after_load, "run": peak_memory(device)},
    }

"""Speed of single packed layers: time, bytes per second, and bf16 beside them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qcli.core.weight import Format
from qcli.inference.bench import BenchOptions, setting
from qcli.inference.linear import QuantLinear
from qcli.inference.load import packed_layer
from qcli.inference.served import backend_of, own_dtype
from qcli.inference.timing import captured, copy_bandwidth, load_average, seconds
from qcli.models.open import open_source
from qcli.models.quantized import QuantizedSource
from qcli.utils.device import resolve_device, resolve_dtype
from qcli.utils.errors import UsageError
from qcli.utils.progress import Progress, silent

_RING = 256 << 20  # bytes of weights that take turns: more than caches hold
_MOST = 64  # weights that take turns


def bench_layers(model: str, options: BenchOptions, progress: Progress = silent) -> dict[str, Any]:
    """Measure each distinct shape and format of a checkpoint once per batch size, in turns with bf16 `F.linear`.

    Raises:
        UsageError: no such model, or it has no packed layers.
    """
    source = open_source(model, options.trust)
    if not isinstance(source, QuantizedSource) or not source.quantized:
        raise UsageError(f"{model} has no packed layers", hint="without --layers the whole model is measured")
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, own_dtype(source, device))
    before, copied = load_average(), copy_bandwidth(device)
    kinds: dict[tuple[Format, tuple[int, int]], list[str]] = {}
    for name, storage in source.quantized.items():
        kinds.setdefault((storage.format, storage.shape), []).append(name)
    rows: list[dict[str, Any]] = []
    work = [(kind, batch) for kind in kinds for batch in options.batches]
    for number, ((format, shape), batch) in enumerate(work):
        progress("measuring layers", number, len(work))
        names = kinds[format, shape]
        choice = backend_of(format, shape, device.type, dtype)
        rows.append(
            {
                "name": names[0],
                "layers": len(names),
                "shape": list(shape),
                "format": format.spec(),
                "batch": batch,
                "backend": choice.backend.name,
                "why_no_other": dict(choice.reasons),
                **_measure(packed_layer(source, names[0], device, dtype), batch, dtype, options.rounds, device, copied),
            }
        )
    progress("measuring layers", len(work), len(work))
    return {
        "model": model,
        "layers": rows,
        "copy_gigabytes_per_second": copied / 1e9,
        "rounds": options.rounds,
        **setting(device, dtype),
        "load_average": [before, load_average()],
    }


@torch.inference_mode()
def _measure(
    layer: QuantLinear, batch: int, dtype: torch.dtype, rounds: int, device: torch.device, copied: float
) -> Mapping[str, Any]:
    rows, columns = layer.shape
    packed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in layer.tensors.values())
    ring = nn.ModuleList(copy.deepcopy(layer) for _ in range(_turns(packed_bytes)))
    dense = [torch.randn(rows, columns, device=device).to(torch.bfloat16) for _ in range(_turns(2 * rows * columns))]
    x = torch.randn(batch, columns, device=device)
    x_packed, x_dense = x.to(dtype), x.to(torch.bfloat16)

    def run_packed() -> None:
        for each in ring:
            each(x_packed)

    def run_dense() -> None:
        for weight in dense:
            F.linear(x_dense, weight)

    run_packed()
    run_dense()
    (packed_run, graph), (dense_run, _) = captured(run_packed, device), captured(run_dense, device)
    times = [(seconds(packed_run, device) / len(ring), seconds(dense_run, device) / len(dense)) for _ in range(rounds)]
    packed_seconds = median(packed for packed, _ in times)
    return {
        "microseconds": 1e6 * packed_seconds,
        "bf16_microseconds": 1e6 * median(dense for _, dense in times),
        "ratio": median(packed / dense for packed, dense in times),
        "packed_bytes": packed_bytes,
        "gigabytes_per_second": packed_bytes / packed_seconds / 1e9,
        "share_of_copy": packed_bytes / packed_seconds / copied,
        "cuda_graph": graph,
    }


def _turns(count: int) -> int:
    """How many weights of so many bytes take turns."""
    return max(1, min(_MOST, _RING // count))

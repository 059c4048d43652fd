"""Embedding and head: slices of rows are quantized one at a time, since rows are independent.

Both are written when all blocks are. An embedding that is rounded is rounded before, too, for the activations that
enter the first block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qcli.algorithms.layer_group import LinearGroup
from qcli.algorithms.method import Method
from qcli.algorithms.solvers.output_error import row_output_errors
from qcli.core.weight import QuantizedWeight
from qcli.models.manifest import LayerReport
from qcli.models.quantized import stored_tensors
from qcli.models.stream import ModelStream
from qcli.quantization.layer_report import layer_report
from qcli.quantization.plan import VOCABULARY_SLICE, Plan
from qcli.utils.progress import Progress


def quantize_vocabulary(
    plan: Plan, hessian: Tensor | None, device: torch.device, progress: Progress
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """The tensors to store, by name, and a report for each layer.

    Args:
        hessian: of the head's inputs, float32 `[hidden, hidden]`; None: nothing reads it.

    Raises:
        UsageError: as `layer_report`.
    """
    tensors: dict[str, Tensor] = {}
    reports = []
    for name, method in plan.vocabulary.items():
        weight = plan.source.read([f"{name}.weight"])[f"{name}.weight"]
        statistics = hessian if method.needs else None
        slices = _slices(weight)
        done, parts = [], []
        for number, rows in enumerate(slices):
            progress(f"quantize {name}", number, len(slices))
            quantized, report, size = _quantized(name, method, rows, statistics, device)
            done.append((report, size))
            parts.append(quantized)
        progress(f"quantize {name}", len(slices), len(slices))
        tensors |= stored_tensors(name, _joined(parts))
        reports.append(_summed(done))
    return tensors, reports


@torch.no_grad()
def round_embedding(plan: Plan, stream: ModelStream) -> bool:
    """Let a stream embed tokens with the rows that the checkpoint will have; whether it does so now.

    Not where the embedding stays dense, nor where it is a head's, too, that is fitted to what leaves the last block.
    """
    embedding = stream.model.get_input_embeddings()
    name = next((name for name in plan.vocabulary if stream.model.get_submodule(name) is embedding), None)
    if name is None or plan.vocabulary[name].needs:
        return False
    rows = plan.source.read([f"{name}.weight"])[f"{name}.weight"]
    for part, own in zip(_slices(rows), _slices(embedding.weight), strict=True):
        own.copy_(_quantized(name, plan.vocabulary[name], part, None, stream.device)[0].dense())
    return True


def _slices(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows that are quantized at a time."""
    slices: tuple[Tensor, ...] = weight.split(max(1, VOCABULARY_SLICE // weight.shape[1]))
    return slices


def _quantized(
    name: str, method: Method, rows: Tensor, hessian: Tensor | None, device: torch.device
) -> tuple[QuantizedWeight, LayerReport, float]:
    """A slice of rows quantized, on the CPU; its report; and the size of its outputs, by which errors are weighted."""
    weight = rows.to(device).float()
    group = LinearGroup({name: weight}, hessian=hessian)
    solution = method.quantize(group)[name]
    report = layer_report(name, method, solution, weight, group)
    return solution.weight.to("cpu"), report, float(row_output_errors(weight, hessian).sum())


def _joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    first = parts[0]
    tables: Mapping[str, Tensor] = {name: torch.cat([part.tables[name] for part in parts]) for name in first.tables}
    shape = (sum(part.shape[0] for part in parts), first.shape[1])
    return QuantizedWeight(first.format, shape, torch.cat([part.codes for part in parts]), tables)


def _summed(reports: Sequence[tuple[LayerReport, float]]) -> LayerReport:
    total = sum(size for _, size in reports)
    error = sum(report.error * size for report, size in reports) / total if total else 0.0
    fallbacks = list(dict.fromkeys(step for report, _ in reports for step in report.fallbacks))
    return replace(reports[0][0], error=error, fallbacks=fallbacks)

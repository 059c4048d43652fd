"""What a distillation would do and need, and whether it is possible: known before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from qcli.data.datasets import is_folder, refuse_images
from qcli.distillation.footprint import distillation_demand
from qcli.models.manifest import Manifest
from qcli.models.native import NativeSource
from qcli.models.open import ModelSource, open_source
from qcli.models.quantized import LayerStorage
from qcli.models.sizes import ModelSizes
from qcli.recipe.distillation import Distillation
from qcli.recipe.recipe import Recipe
from qcli.utils.device import has_fast_matmul, local_device, resolve_dtype
from qcli.utils.distributed import local_world_size, world_size
from qcli.utils.errors import UsageError
from qcli.utils.placement import Placement, place
from qcli.utils.trust import NOTHING, Trust


@dataclass(frozen=True)
class DistillationPlan:
    """What `distill` would do, from headers alone.

    Attributes:
        layers: quantized layers, which are trained.
        weights: number of their weights.
        trained: number of trained parameters.
        tokens: of all steps together.
        memory: what training needs at its peak.
    """

    student: str
    teacher: str
    layers: int
    weights: int
    trained: int
    tokens: int
    memory: Placement

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def plan_distillation(student: Path, recipe: Recipe, trust: Trust = NOTHING) -> DistillationPlan:
    """Check everything that `distill` can check before it starts.

    Raises:
        UsageError: not a qcli checkpoint, another architecture than the teacher's, or options that fit neither.
        ResourceError: student, teacher and optimizer do not fit in memory.
    """
    options, text = recipe.distill or Distillation(), recipe.distill_text
    source, teacher = open_pair(student, recipe.source, trust)
    source.companions()  # what cannot be copied is refused before any work
    original = Manifest.read(student).source
    shared = original.model == recipe.model and original.fingerprint == teacher.fingerprint()
    memory = require_feasible(recipe, source.quantized, teacher, shared=shared)
    n_weights = sum(rows * columns for rows, columns in (layer.shape for layer in source.quantized.values()))
    n_trained = 0
    if "weights" in options.train:
        n_trained += n_weights
    if "tables" in options.train:
        n_trained += _table_entries(source)
    n_trained += sum(prod(source.extents[f"{name}.bias"].stored.shape) for name in _biased(source))
    pass_tokens = max(1, options.batch_tokens // text.seq_len) * text.seq_len
    n_trainings = source.hf_config().get_text_config().num_hidden_layers if options.scope == "block" else 1
    return DistillationPlan(
        student=str(student),
        teacher=recipe.source,
        layers=len(source.quantized),
        weights=n_weights,
        trained=n_trained,
        tokens=options.steps * options.accumulate * pass_tokens * n_trainings,
        memory=memory,
    )


def require_feasible(
    recipe: Recipe, layers: Mapping[str, LayerStorage], teacher: ModelSource, *, shared: bool
) -> Placement:
    """Refuse options that fit neither model nor processes, and a training that does not fit in memory.

    Args:
        layers: the student's quantized layers, which may exist only as a plan.
        shared: whether the student was made from this teacher, so that they have one embedding and head.

    Returns:
        Where the training keeps what it needs.

    Raises:
        UsageError, ResourceError, UnsupportedError: as `plan_distillation`.
    """
    options, text, processes = recipe.distill or Distillation(), recipe.distill_text, world_size()
    vocabulary = teacher.hf_config().get_text_config().vocab_size
    exact = next((name for name, layer in layers.items() if not layer.format.rounds), None)
    if exact is not None:
        raise UsageError(f"{exact} is in full precision: there are no codes and tables to train")
    fixed = next((name for name, layer in layers.items() if not layer.format.trains_tables), None)
    if fixed is not None and "weights" not in options.train:
        reason = f"{fixed} is {layers[fixed].format.name}, whose tables cannot be trained"
        raise UsageError(f"distill.train: {reason}", hint="--train tables,weights")
    if options.scope == "block" and processes > 1:
        raise UsageError("distill.scope: block uses a single process", hint="run without torchrun")
    if options.accumulate % processes:
        raise UsageError(
            f"distill.accumulate: {options.accumulate} passes per step cannot be divided among {processes} processes",
            hint="use a multiple of the number of processes",
        )
    if options.teacher_top_k is not None and options.teacher_top_k >= vocabulary:
        raise UsageError(f"distill.teacher_top_k: {options.teacher_top_k} is not below the vocabulary of {vocabulary}")
    refuse_images(text.data)
    if text.samples <= text.held_out and not is_folder(text.data):
        raise UsageError(
            f"{text.held_out} of {text.samples} samples are held out: none is left to train on",
            hint="use more --samples",
        )
    device = local_device(recipe.device)
    demand = distillation_demand(
        options,
        text,
        ModelSizes.of(teacher),
        layers.values(),
        vocabulary=vocabulary,
        itemsize=resolve_dtype(recipe.dtype).itemsize,
        fast=recipe.dtype == "auto" and has_fast_matmul(device),
        processes=processes,
        shared=shared,
        device=device.type,
    )
    placement = place(demand, device, recipe.max_memory, "this distillation", local_world_size())
    ways = ["--train tables needs less"] if "weights" in options.train else []
    ways += ["--scope block needs only one block in memory"] if options.scope == "model" else []
    placement.require("; ".join([*ways, "a smaller distill.batch_tokens needs less"]))
    return placement


def open_pair(student: Path, teacher: str, trust: Trust = NOTHING) -> tuple[NativeSource, ModelSource]:
    """The student's checkpoint and its teacher.

    Raises:
        UsageError: not a checkpoint of qcli, or not of the teacher's architecture.
    """
    source, teacher_source = open_source(str(student), trust), open_source(teacher, trust)
    if not isinstance(source, NativeSource):
        raise UsageError(f"{student} is not a checkpoint that qcli wrote", hint="quantize the model first")
    layers = [[(linear.name, linear.shape) for linear in each.linears()] for each in (source, teacher_source)]
    vocabularies = {each.hf_config().get_text_config().vocab_size for each in (source, teacher_source)}
    if layers[0] != layers[1] or len(vocabularies) > 1:
        raise UsageError(
            f"{teacher} cannot teach {student}: its layers or its vocabulary differ",
            hint=f"the checkpoint was made from {Manifest.read(student).source.model}",
        )
    return source, teacher_source


def _biased(source: NativeSource) -> list[str]:
    """Quantized layers that have a bias."""
    return [name for name in source.quantized if f"{name}.bias" in source.extents]


def _table_entries(source: NativeSource) -> int:
    """Number of entries in all stored tables."""
    return sum(
        prod(stored.shape)
        for name, layer in source.quantized.items()
        for suffix, stored in layer.stored(name).items()
        if not suffix.endswith("weight_packed")
    )

"""What a distillation would do and need, and whether it can: known before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from qcli.data.datasets import is_folder
from qcli.distillation.whole_model import needed_memory
from qcli.models.manifest import Manifest
from qcli.models.native import NativeSource
from qcli.models.open import Source, open_source
from qcli.models.quantized import LayerStorage
from qcli.recipe.distillation import Distillation
from qcli.recipe.recipe import Recipe
from qcli.utils.device import local_device, resolve_dtype
from qcli.utils.distributed import local_world_size, world_size
from qcli.utils.errors import ResourceError, UsageError
from qcli.utils.memory import free_memory


@dataclass(frozen=True)
class Intended:
    """What `distill` would do, from headers alone.

    Attributes:
        layers: quantized ones, which are trained.
        weights, trained: weights of these layers, and numbers that the optimizer moves.
        tokens: of all steps together.
        memory: bytes that training takes besides activations, at least; None: one block's at a time.
        free: bytes of memory.
    """

    student: str
    teacher: str
    layers: int
    weights: int
    trained: int
    tokens: int
    memory: int | None
    free: int | None

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


def intend(student: Path, recipe: Recipe) -> Intended:
    """Check everything that `distill` can know before it starts.

    Raises:
        UsageError: no qcli checkpoint, another architecture than the teacher's, or options that do not fit them.
        ResourceError: model, teacher and optimizer do not fit in memory.
    """
    options, text = recipe.distill or Distillation(), recipe.distill_text
    pupil, master = pair(student, recipe.model)
    needed, free = require_possible(recipe, pupil.quantized, master.hf_config().get_text_config().vocab_size)
    n_weights = sum(rows * columns for rows, columns in (layer.shape for layer in pupil.quantized.values()))
    return Intended(
        student=str(student),
        teacher=recipe.model,
        layers=len(pupil.quantized),
        weights=n_weights,
        trained=(n_weights if "weights" in options.train else 0) + (_tables(pupil) if "tables" in options.train else 0),
        tokens=options.steps
        * options.accumulate
        * max(1, options.batch_tokens // text.seq_len)
        * text.seq_len
        * (pupil.hf_config().get_text_config().num_hidden_layers if options.scope == "block" else 1),
        memory=needed,
        free=free,
    )


def require_possible(
    recipe: Recipe, layers: Mapping[str, LayerStorage], vocabulary: int
) -> tuple[int | None, int | None]:
    """Refuse options that do not fit the model or the processes, and what does not fit in memory.

    Args:
        layers: the student's quantized layers, that exist or are planned.

    Returns:
        `memory` and `free` of `Intended`.

    Raises:
        UsageError, ResourceError: as `intend`.
    """
    options, text, processes = recipe.distill or Distillation(), recipe.distill_text, world_size()
    if options.scope == "block" and processes > 1:
        raise UsageError("distill.scope: blocks are trained by one process", hint="run without torchrun")
    if options.accumulate % processes:
        raise UsageError(
            f"distill.accumulate: {options.accumulate} passes of a step cannot be shared by {processes} processes",
            hint="use a multiple: results are those of one process then",
        )
    if options.teacher_top_k is not None and options.teacher_top_k >= vocabulary:
        raise UsageError(f"distill.teacher_top_k: {options.teacher_top_k} is not below the vocabulary of {vocabulary}")
    if text.samples <= text.held_out and not is_folder(text.data):
        raise UsageError(
            f"{text.samples} samples: {text.held_out} are held out and none is left to train on",
            hint="use more --samples",
        )
    device, needed = local_device(recipe.device), None
    free = free_memory(device)
    if free is not None and device.type == "cpu":
        free //= local_world_size()
    if options.scope == "model":
        needed = needed_memory(layers, options, resolve_dtype(recipe.dtype).itemsize, processes)
        if free is not None and needed > free:
            raise ResourceError(
                f"distilling the whole model needs at least {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                hint="--train tables needs less; --scope block needs one block at a time",
            )
    return needed, free


def pair(student: Path, teacher: str) -> tuple[NativeSource, Source]:
    """The student's checkpoint and its teacher.

    Raises:
        UsageError: not a checkpoint of qcli, or not the teacher's architecture.
    """
    pupil, master = open_source(str(student)), open_source(teacher)
    if not isinstance(pupil, NativeSource):
        raise UsageError(f"{student} is not a checkpoint that qcli wrote", hint="quantize the model first")
    ours, theirs = ([(linear.name, linear.shape) for linear in source.linears()] for source in (pupil, master))
    vocabularies = {source.hf_config().get_text_config().vocab_size for source in (pupil, master)}
    if ours != theirs or len(vocabularies) > 1:
        raise UsageError(
            f"{teacher} has other layers or another vocabulary than {student}, whose teacher it cannot be",
            hint=f"the checkpoint was made from {Manifest.read(student).source.model}",
        )
    return pupil, master


def _tables(pupil: NativeSource) -> int:
    """Entries of all tables as they are stored."""
    return sum(
        prod(stored.shape)
        for name, layer in pupil.quantized.items()
        for suffix, stored in layer.stored(name).items()
        if not suffix.endswith("weight_packed")
    )

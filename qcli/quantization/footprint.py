"""The memory that a quantization needs at its peak, phase by phase of the block loop; from headers alone.

`benchmarks/memory.py` compares it with what is measured.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from qcli.algorithms.layer_group import CROSS, HESSIAN, OUTPUT_GAP
from qcli.algorithms.solvers.tiles import tile_size_on
from qcli.core.formats.affine import Affine
from qcli.models.sizes import ModelSizes, experts_at_once, pass_tokens
from qcli.quantization.plan import VOCABULARY_SLICE, Plan
from qcli.utils.distributed import local_world_size, world_size
from qcli.utils.dtypes import torch_dtype
from qcli.utils.memory import KEPT_HEAP
from qcli.utils.placement import RUNTIME, Demand, Peak, Placement, place

if TYPE_CHECKING:
    import torch

    from qcli.models.source import ModelSource
    from qcli.recipe.sections import Calibration

_DATA_FREE = 340 * 10**6  # bytes of a process that runs no model
TRAINED_TOKENS = 1024  # of a training step
_ROUNDED = 1.25  # bytes of a weight that a transform rounds: its code, and what its group has
_TILED = 36  # bytes of a number in a tile that a transform works on
_UNITS = 4  # bytes of a weight whose latent has a unit of its own, where grids are not uniform
_PATCHES = 4  # of an image, merged to one token
_MASKS = 2  # of one byte for a pair of tokens
_ROUNDING = 10  # bytes of a weight among those that refinement rounds together


def quantization_placement(plan: Plan) -> Placement:
    """Where quantizing by this plan keeps its activations on this machine, and whether it fits."""
    from qcli.utils.device import has_fast_matmul, local_device, resolve_dtype

    recipe = plan.recipe
    device, dtype = local_device(recipe.device), resolve_dtype(recipe.dtype)
    fast = recipe.dtype == "auto" and has_fast_matmul(device)
    demand = quantization_demand(plan, dtype, fast=fast, device=device.type)
    return place(demand, device, recipe.max_memory, "quantizing this model", local_world_size())


def planned(plan: Plan, placement: Placement) -> dict[str, Any]:
    """The plan with its memory, as plain data."""
    return plan.to_json() | {"peak_memory_estimate": placement.peak, "memory": placement.to_json()}


def memory_hint(plan: Plan) -> str:
    """What makes a quantization that does not fit need less."""
    ways = ["fewer --samples or a shorter --seq-len take less"] if plan.calibrated else []
    if any(transform.whole_model for transform in plan.recipe.all_transforms):
        ways.append("teq's loss: block holds one block instead of all")
    elif plan.reconstructs:
        ways.append("--set refine.train=[tables] trains no weights")
    ways.append("--device cpu, or another --max-memory")
    return "; ".join(ways)


def quantization_demand(plan: Plan, dtype: torch.dtype, *, fast: bool, device: str = "cuda") -> Demand:
    """What quantizing by this plan needs.

    Args:
        dtype: of activations and dense weights.
        fast: whether linear layers compute in bf16 or TF32.
        device: `cpu` or `cuda`.
    """
    sizes = ModelSizes.of(plan.source)
    trains = plan.recipe.refinement is not None or plan.recipe.all_transforms
    kept_heap = KEPT_HEAP if device == "cpu" and trains else 0
    peak = Peak(RUNTIME + kept_heap if plan.calibrated else _DATA_FREE)
    outside = sum(tensor.bytes for tensor in plan.parts[-1].values())
    peak.add(host=outside)  # as it is written
    part = max(sum(tensor.bytes for tensor in part.values()) for part in plan.parts[:-1])
    _add_vocabulary(plan, peak)
    if not plan.calibrated:
        rows, columns = max((layer.shape for layer in sizes.layers), key=prod)
        methods = [method for method in dict.fromkeys(plan.methods.values()) if method is not None]
        work = max(method.workspace(rows, columns) for method in methods)
        peak.add(device=4 * rows * columns + work + sizes.block, host=2 * rows * columns)
        peak.add(device=sizes.block, host=2 * part)
        return peak.demand(waiting=0)
    peak.add(device=sizes.outside * dtype.itemsize, host=outside)
    if plan.sees_images:
        patches = _PATCHES * plan.recipe.calibration.seq_len
        whole = (sizes.outside + sizes.beside) * dtype.itemsize
        peak.add(device=whole + sizes.forward(patches, dtype.itemsize), host=outside)
    _add_blocks(plan, sizes, dtype.itemsize, fast=fast, tile=tile_size_on(device), peak=peak, part=part)
    return peak.demand(waiting=_waiting(plan, sizes, dtype.itemsize, fast=fast))


def calibration_demand(source: ModelSource, text: Calibration, itemsize: int, *, fast: bool, hessians: bool) -> Demand:
    """What `calibrate` needs.

    Args:
        itemsize: of activations and dense weights.
        fast: whether linear layers compute in bf16 or TF32.
        hessians: whether it keeps those of a block.
    """
    sizes, peak = ModelSizes.of(source), Peak(RUNTIME)
    prefix = f"{source.family.blocks}."
    outside = sum(tensor.bytes for name, tensor in source.tensors().items() if not name.startswith(prefix))
    peak.add(device=sizes.outside * itemsize, host=outside)
    squares = sum({layer.group: layer.shape[1] ** 2 for layer in sizes.layers}.values()) if hessians else 0
    block = itemsize * (sizes.outside + sizes.block) + 4 * squares
    forward = sizes.forward(pass_tokens(text.samples, text.seq_len), 2 if fast else itemsize)
    peak.add(device=block + max(forward, 16 * sizes.largest, 8 * squares))
    return peak.demand(waiting=text.samples * text.seq_len * sizes.hidden * itemsize)


def _add_vocabulary(plan: Plan, peak: Peak) -> None:
    """Embedding and head: a slice of rows on the device, source and codes in host memory."""
    for name, method in plan.vocabulary.items():
        storage = plan.vocabulary_storage[name]
        columns = storage.shape[1]
        rows = min(storage.shape[0], max(1, VOCABULARY_SLICE // columns))
        statistics = 4 * columns**2 if method.needs else 0
        packed = sum(tensor.bytes for tensor in storage.stored(name).values())
        source = plan.source.tensors()[f"{name}.weight"].bytes
        host = source + 2 * prod(storage.shape) + packed  # codes, and their slices before
        peak.add(device=4 * rows * columns + method.workspace(rows, columns) + statistics, host=host)


def _add_blocks(plan: Plan, sizes: ModelSizes, itemsize: int, *, fast: bool, tile: int, peak: Peak, part: int) -> None:
    """A block, group by group as `Sequential` goes through it."""
    recipe, text = plan.recipe, plan.recipe.calibration
    kept = 2 if fast else itemsize
    forward = sizes.forward(pass_tokens(text.samples, text.seq_len), kept)
    exact = fast and not recipe.all_transforms and plan.source_dtype == "BF16"
    twin = (kept if exact else itemsize) * sizes.block if plan.compares else 0
    block_index = sizes.layers[0].block
    chosen = plan.methods_of(block_index)
    model = 0
    if any(transform.whole_model for transform in recipe.all_transforms):
        model = itemsize * sum(prod(layer.shape) for layer in plan.layers) + sizes.outside * itemsize
    done, groups = 0, dict.fromkeys(layer.group for layer in sizes.layers)
    for group in groups:
        members = [layer for layer in sizes.layers if layer.group == group]
        rows, columns = sum(layer.shape[0] for layer in members), members[0].shape[1]
        methods = {chosen[layer.path] for layer in members if layer.path in chosen}
        needs = frozenset[str]().union(*map(plan.needs_of, methods))
        if OUTPUT_GAP in needs and plan.source.family.groups_of(block_index)[group].residual is None:
            needs |= {CROSS}
        statistics = 4 * columns**2 * len(needs & {HESSIAN, CROSS})
        if OUTPUT_GAP in needs and CROSS not in needs:
            statistics += 4 * rows * columns
        if recipe.refinement is not None and recipe.refinement.scope == "linear":
            statistics *= 2  # of held-out samples
        # module, twin, codes, and targets of the reconstruction, the new ones on the device
        block = itemsize * (sizes.block - done) + kept * done + twin + done
        targets = 4 * done if plan.reconstructs else 0
        sets = plan.source.family.groups_of(block_index)[group].sets
        if len(sets) > 1:  # experts are solved one by one; a pass has the statistics and float32 weights of several
            count = min(len(sets), experts_at_once(columns))
            statistics = statistics * (count + 1) + 4 * count * columns * rows // len(sets)
        work = max((method.workspace(rows // len(sets), columns) for method in methods), default=0)
        peak.add(device=block + statistics + max(forward, work), waiting=targets)
        done += rows * columns
    peak.add(device=itemsize * sizes.block + twin, host=sizes.block * torch_dtype(plan.source_dtype).itemsize)
    trained, parts = max(text.seq_len, TRAINED_TOKENS), sizes.joined
    if recipe.all_transforms:
        of = sum(prod(layer.shape) for layer in plan.layers) if model else sizes.block
        originals = model or itemsize * sizes.block + twin
        copies = 4 * of * sum(size for names, size in parts if len(names) > 1) // sizes.block
        rounded = int((_ROUNDED + kept) * of)
        work = _TILED * min(tile, max(size for _, size in parts))
        peak.add(device=originals + copies + rounded + max(work, 2 * sizes.forward(trained, kept)))
    if recipe.refinement is not None:
        tokens = max(text.seq_len, recipe.refinement.batch_tokens)
        weights = sizes.block if plan.reconstructs else sizes.largest
        uniform = all(format is None or isinstance(format, Affine) for format in plan.formats.values())
        units = _UNITS if "weights" in recipe.refinement.train and not uniform else 0
        resting = (recipe.refinement.bytes_per_weight(kept) + units) * weights
        rounding = _ROUNDING * max(size for _, size in parts)
        peak.add(device=resting + max(rounding, kept * weights, 2 * sizes.forward(tokens, kept)))
    peak.add(device=kept * sizes.block + sizes.block, host=2 * part)


def _waiting(plan: Plan, sizes: ModelSizes, itemsize: int, *, fast: bool) -> int:
    """The activations of a process's samples, of one or both streams: hidden states, the outputs of attention, and the
    inputs of the last linear."""
    text, kept = plan.recipe.calibration, 2 if fast else itemsize
    streams = 2 if plan.compares else 1
    inputs = sizes.layers[-1].shape[1] * kept
    targets = sizes.hidden * itemsize if plan.recipe.all_transforms else 0
    states = streams * sizes.hidden * (itemsize + kept)
    if plan.sees_images:  # what blocks are given: masks, and features of images
        states += _MASKS * text.seq_len + sizes.hidden * itemsize
    return -(-text.samples // world_size()) * text.seq_len * (states + max(inputs, targets))

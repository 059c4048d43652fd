"""The memory that a distillation needs at its peak; from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from qcli.algorithms.training.losses import LOGITS_AT_ONCE
from qcli.core.formats.affine import Affine
from qcli.models.quantized import LayerStorage
from qcli.models.sizes import ModelSizes
from qcli.recipe.distillation import Distillation
from qcli.recipe.sections import Text
from qcli.utils.placement import RUNTIME, Demand, Peak

_LATENTS, _UNITS = 16, 4  # bytes of a weight that is trained: latent, gradient, two moments; and its unit
_TABLES = 28  # bytes of a table's entry: value, change and unit, gradient, two moments, rounded value
_STEPS = 4  # bytes of a weight of the block that computes, besides the dense weight and its gradient
_ROUNDING = 10  # bytes of a weight among those that are rounded together
_PART = 28  # bytes of a logit among those whose loss is computed at once
_CACHED_LOGIT = 21  # bytes of a logit that is compared with cached predictions


def distillation_demand(
    options: Distillation,
    text: Text,
    sizes: ModelSizes,
    layers: Iterable[LayerStorage],
    *,
    vocabulary: int,
    itemsize: int,
    fast: bool,
    processes: int,
    shared: bool,
    device: str,
) -> Demand:
    """What training needs in each process.

    Args:
        text: of the training.
        sizes: of both models.
        layers: the student's quantized layers.
        itemsize: of activations and dense weights.
        fast: whether linear layers compute in bf16 or TF32.
        processes: that share parameters.
        shared: whether the student has the teacher's embedding and head.
        device: `cpu` or `cuda`.
    """
    kept = 2 if fast else itemsize
    weights, entries, units = 0, 0, 0
    for layer in layers:
        weights += prod(layer.shape)
        stored = layer.format.stored(layer.shape)
        entries += sum(prod(table.shape) for name, table in stored.items() if name != "weight_packed")
        units += 0 if isinstance(layer.format, Affine) else _UNITS * prod(layer.shape)
    blocks = -(-weights // sizes.block)
    trained = _LATENTS * weights + units if "weights" in options.train else 0
    tokens = text.seq_len * max(1, options.batch_tokens // text.seq_len)
    table = vocabulary * sizes.hidden  # the embedding, or the head
    outside, peak = itemsize * (sizes.outside - table) + kept * table, Peak(RUNTIME)
    logits = kept * tokens * vocabulary
    # of both models, and the gradient, which deviation awareness needs twice; for bf16 products a CPU lays it out anew
    copies = (4 if options.loss == "dad" else 3) + (fast and device == "cpu")
    loss = copies * logits + _PART * min(tokens * vocabulary, LOGITS_AT_ONCE[device])
    joint = max(size for _, size in sizes.joined)
    computing = (_STEPS + 2 * kept) * sizes.block + max(_ROUNDING * joint, 2 * sizes.forward(tokens, kept))
    host = 4 * weights // processes if trained else 0  # the best step's latents
    peak.add(device=outside + itemsize * sizes.outside + kept * table)  # as the second model is loaded
    if options.scope == "block":
        student = sizes.block + (trained + _TABLES * entries) // blocks
        states = 2 * 4 * sizes.hidden * text.samples * text.seq_len
        head = kept * table + itemsize * max(0, sizes.outside - 2 * table)  # the embedding is freed
        heads = head if shared else 2 * head
        peak.add(device=heads + student + max(loss, computing), host=host // blocks)
        return peak.demand(waiting=states)
    teacher = kept * weights // processes + outside
    student = weights + (trained + _TABLES * entries) // processes
    states = itemsize * tokens * sizes.hidden * blocks * (2 if options.needs_hidden else 1)
    if options.teacher_top_k is None:
        student += teacher if shared else teacher + outside
        peak.add(device=student + states + max(loss, 2 * logits + computing), host=host)
    else:
        cached = text.samples * text.seq_len * (8 * options.teacher_top_k + 4)
        peak.add(device=teacher + loss)
        loss = _CACHED_LOGIT * tokens * vocabulary
        peak.add(device=student + outside + states + max(loss, computing), host=host + cached)
    return peak.demand(waiting=0)

"""The memory that a distillation needs at its peak; from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from qcli.algorithms.training.losses import LOGITS_AT_ONCE
from qcli.models.quantized import LayerStorage
from qcli.models.sizes import ModelSizes
from qcli.recipe.distillation import Distillation
from qcli.recipe.sections import Calibration
from qcli.utils.placement import RUNTIME, Demand, Peak

_LATENTS = 20  # bytes of a weight that is trained: latent and its unit, gradient, two moments
_TABLES = 28  # bytes of a table's entry: value, change and unit, gradient, two moments, rounded value
_DENSE = 22  # bytes of a weight of the block that computes: dense, decoded, and what gradients need of both
_PART = 28  # bytes of a logit among those whose loss is computed at once
_CACHED_LOGIT = 21  # bytes of a logit that is compared with cached predictions


def distillation_demand(
    options: Distillation,
    text: Calibration,
    sizes: ModelSizes,
    layers: Iterable[LayerStorage],
    *,
    vocabulary: int,
    itemsize: int,
    fast: bool,
    processes: int,
) -> Demand:
    """What training needs in each process.

    Args:
        text: of the training.
        sizes: of both models.
        layers: the student's quantized layers.
        itemsize: of activations and dense weights.
        fast: whether linear layers compute in bf16 or TF32.
        processes: that share parameters.
    """
    kept = 2 if fast else itemsize
    weights = sum(prod(layer.shape) for layer in layers)
    entries = sum(
        prod(stored.shape)
        for layer in layers
        for suffix, stored in layer.format.stored(layer.shape).items()
        if suffix != "weight_packed"
    )
    blocks = -(-weights // sizes.block)
    trained = _LATENTS if "weights" in options.train else 0
    tokens = text.seq_len * max(1, options.batch_tokens // text.seq_len)
    table = vocabulary * sizes.hidden  # the embedding, or the head
    outside, peak = itemsize * (sizes.outside - table) + kept * table, Peak(RUNTIME)
    # of both models, and the gradient, which deviation awareness needs twice
    logits = (4 if options.loss == "dad" else 3) * kept * tokens * vocabulary
    logits += _PART * min(tokens * vocabulary, LOGITS_AT_ONCE["cuda"])
    computing = _DENSE * sizes.block + 4 * sizes.forward(tokens, kept)
    host = 4 * weights // processes if trained else 0  # the best step's latents
    if options.scope == "block":
        student = (1 + trained) * sizes.block + _TABLES * entries // blocks
        states = 2 * 4 * sizes.hidden * text.samples * text.seq_len
        head = kept * table + itemsize * max(0, sizes.outside - 2 * table)  # the embedding is freed
        peak.add(device=2 * outside)
        peak.add(device=2 * head + kept * sizes.block + student + computing + logits, host=host // blocks)
        return peak.demand(waiting=states)
    teacher = kept * weights // processes + outside
    student = weights + (trained * weights + _TABLES * entries) // processes + outside
    states = itemsize * tokens * sizes.hidden * blocks * (2 if options.needs_hidden else 1)
    if options.teacher_top_k is None:
        peak.add(device=teacher + student + states + computing + logits, host=host)
    else:
        cached = text.samples * text.seq_len * (8 * options.teacher_top_k + 4)
        peak.add(device=teacher + logits)
        logits = _CACHED_LOGIT * tokens * vocabulary
        peak.add(device=student + states + computing + logits, host=host + cached)
    return peak.demand(waiting=0)

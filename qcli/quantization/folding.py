"""Channel scales of a block: which rows and columns a family's folds cover, and how scales are folded into weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qcli.algorithms.transform import ChannelScale
from qcli.models.families import Fold, Rows
from qcli.models.stream import ModelStream


def channel_scales(block: nn.Module, folds: Iterable[Fold], config: PreTrainedConfig) -> list[ChannelScale]:
    """Folds as index maps on this block's rows and columns.

    A fold into a norm without a weight is left out.

    Args:
        block: as `ModelStream.load_block` gives it.
        folds: of the block.
        config: of the model; only the number of attention heads is read, all else follows from shapes.
    """
    return [_channel_scale(block, fold, config) for fold in folds if _weight(block, fold.producer) is not None]


@torch.no_grad()
def fold(
    block: nn.Module,
    scales: Sequence[ChannelScale],
    alphas: Sequence[Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> list[str]:
    """Fold `alphas` into the block's weights, which leaves its function unchanged.

    A norm's weight is rounded to the dtype it will be stored in, and the readers are multiplied by the quotient of
    before and after, so that the rounding cancels. Where that quotient is not a positive number (the weight is 0, or
    it leaves the dtype's range) the channel is skipped. The rounding of a bias does not cancel.

    Args:
        scales: of this block.
        alphas: positive, `[size]` each.
        dtypes: of stored norm weights, biases and dense readers, by name in the block; others are not rounded.

    Returns:
        Names of all tensors that changed, the linears' weights included.
    """
    stored, changed = dtypes or {}, dict[str, None]()
    for scale, factors in zip(scales, alphas, strict=True):
        producer, alpha, name = block.get_submodule(scale.producer), factors.float(), f"{scale.producer}.weight"
        if (own := producer.get_parameter("weight")).ndim == 1:
            divisors = _divide_norm(own, scale.per_output(alpha), scale.norm_offset, stored.get(name))
            folded = torch.where(scale.outputs >= 0, scale.outputs, len(alpha))  # one place more for all others
            alpha = alpha.new_ones(len(alpha) + 1).index_copy(0, folded, divisors)[:-1]
        else:
            weight = ModelStream.weight_of(producer)
            weight.copy_(weight / scale.per_output(alpha)[:, None])
        changed[name] = None
        bias = producer._parameters.get("bias")
        if bias is not None:
            name = f"{scale.producer}.bias"
            bias.copy_(_rounded(bias / scale.per_output(alpha), stored.get(name)))
            changed[name] = None
        for reader in scale.readers:
            weight = ModelStream.weight_of(block.get_submodule(reader))
            weight.copy_(weight * scale.per_input(alpha))
            changed[f"{reader}.weight"] = None
        for name in scale.dense:
            matrix = block.get_parameter(name)
            matrix.copy_(_rounded(matrix * scale.per_input(alpha), stored.get(name)))
            changed[name] = None
    return list(changed)


def _divide_norm(weight: Tensor, alpha: Tensor, offset: float, dtype: torch.dtype | None) -> Tensor:
    """Divide a norm's weight in place; returns the divisor of each channel after rounding, float32."""
    before = weight.double() + offset
    after = _rounded(before / alpha - offset, dtype).to(weight.dtype)
    divisor = (before / (after.double() + offset)).float()
    usable = (divisor > 0) & divisor.isfinite()
    weight.copy_(torch.where(usable, after, weight))
    return torch.where(usable, divisor, 1.0)


def _rounded(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    return values if dtype is None else values.to(dtype)


def _channel_scale(block: nn.Module, fold: Fold, config: PreTrainedConfig) -> ChannelScale:
    weight = _weight(block, fold.producer)
    assert weight is not None
    outputs, inputs = len(weight), ModelStream.weight_of(block.get_submodule(fold.readers[0])).shape[1]
    if fold.places is None:
        heads = config.get_text_config().num_attention_heads
        rows = _rows(fold.rows, outputs, inputs, heads)
        size = len(rows)
        of_outputs = torch.full((outputs,), -1, dtype=torch.int64)
        of_outputs[rows] = torch.arange(size)
        of_inputs = _channel_of_inputs(size, inputs, heads)
    else:
        of_outputs, of_inputs = torch.tensor(fold.places.outputs), torch.tensor(fold.places.inputs)
        size = int(of_outputs.max()) + 1
    maps = of_outputs.to(weight.device), of_inputs.to(weight.device)
    return ChannelScale(fold.producer, fold.readers, *maps, size, fold.norm_offset, fold.dense)


def _rows(rows: Rows, outputs: int, inputs: int, heads: int) -> Tensor:
    """Output rows of the producer in the order of the channels: int64 `[channels]`.

    A fused attention projection has as many query rows as its reader has inputs; half of the others are values.
    """
    every, values, head = torch.arange(outputs), (outputs - inputs) // 2, inputs // heads
    match rows:
        case "all":
            return every
        case "second half":
            return every[outputs // 2 :]
        case "stacked v":
            return every[outputs - values :]
        case "interleaved v":
            return every.view(values // head, -1, head)[:, -1].flatten()


def _channel_of_inputs(channels: int, inputs: int, heads: int) -> Tensor:
    """The channel of each input of a reader: int64 `[inputs]`.

    Where there are fewer channels than inputs, consecutive query heads share the channels of one kv head.
    """
    if channels == inputs:
        return torch.arange(inputs)
    head = inputs // heads
    return torch.arange(channels).view(-1, 1, head).expand(-1, inputs // channels, -1).flatten()


def _weight(block: nn.Module, path: str) -> Tensor | None:
    """The weight of a norm, or of a linear as `[out, in]`; None where a norm has none."""
    module = block.get_submodule(path)
    return None if module._parameters.get("weight") is None else ModelStream.weight_of(module)

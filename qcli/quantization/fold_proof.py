"""Proof that the folds of a discovered model leave its blocks' function as it is, before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.transform import ChannelScale
from qcli.models.families import Fold
from qcli.models.stream import ModelStream
from qcli.models.stream_proof import probes
from qcli.quantization.folding import channel_scales, fold
from qcli.utils.errors import UnsupportedError
from qcli.utils.text import with_wildcards

_TOLERANCE = 1e-4  # of a token's norm
_HALF = 1e-3  # the same in half precision, of which float16 rounds the smallest numbers
_COARSE = 3e-2  # the same for norms with an offset, whose weights are rounded


@torch.no_grad()
def prove_folds(stream: ModelStream) -> None:
    """Fold random factors into the first block of each kind, and compare its outputs with those before. Factors are
    powers of two, which round nothing, so that routers choose the same experts. One block is in memory at a time.

    Raises:
        UnsupportedError: outputs differ; the message names the fold and the difference.
    """
    _, entering = probes(stream)
    hidden = torch.cat(entering)
    generator = torch.Generator().manual_seed(0)
    proven: list[tuple[str, tuple[Fold, ...]]] = []
    for index in range(stream.n_blocks):
        kind = stream.kind_of(index), stream.family.folds_of(index)
        if kind in proven:
            continue
        proven.append(kind)
        block = stream.load_block(index)
        alike: dict[str, list[ChannelScale]] = {}
        for scale in channel_scales(block, kind[1], stream.config):
            alike.setdefault(with_wildcards(scale.producer), []).append(scale)
        before = stream.run_block(block, index, hidden)
        for producer, scales in alike.items():
            exponents = [torch.randint(-1, 2, (scale.size,), generator=generator) for scale in scales]
            fold(block, scales, [torch.exp2(each.float()).to(stream.device) for each in exponents])
            found = stream.run_block(block, index, hidden)
            if difference := _difference(found, before, scales[0], stream.dtype):
                readers = ", ".join(dict.fromkeys(with_wildcards(path) for path in scales[0].readers))
                raise UnsupportedError(
                    f"model type {stream.family.model_type!r}: block {index} computes something else when factors are "
                    f"folded into {producer} and {readers} (outputs differ by {difference:.1%})",
                    hint="methods without transforms take any model, such as gptq-like",
                )
            before = found


def _difference(found: Tensor, expected: Tensor, scale: ChannelScale, dtype: torch.dtype) -> float:
    """Of the token that differs most, relative to its norm; 0 within the tolerance. With an offset, factors of a norm
    are rounded, and a token in doubt may go to another expert: that of half of the tokens."""
    size = expected.double().norm(dim=-1).clamp(min=1e-30)
    errors = (found.double() - expected.double()).norm(dim=-1) / size
    rounded = scale.norm_offset != 0
    difference = float(errors.median() if rounded else errors.max())
    half = _COARSE if rounded else _HALF
    return 0.0 if difference <= (_TOLERANCE if dtype == torch.float32 else half) else difference

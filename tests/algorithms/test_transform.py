"""Channel scales: index maps from alphas to the outputs and inputs they scale."""

from __future__ import annotations

import torch

from qcli.algorithms.transform import ChannelScale

# A fused producer: only its last two rows have alphas, and the reader sees each of them twice.
SCALE = ChannelScale("qkv", ("o",), torch.tensor([-1, -1, 0, 1]), torch.tensor([0, 1, 0, 1]), 2)


def test_alphas_are_spread_over_outputs_and_inputs() -> None:
    alpha = torch.tensor([2.0, 3.0])
    assert SCALE.per_output(alpha).tolist() == [1, 1, 2, 3]
    assert SCALE.per_output(alpha, default=0.0).tolist() == [0, 0, 2, 3]
    assert SCALE.per_input(alpha).tolist() == [2, 3, 2, 3]


def test_prefix_comes_before_every_path() -> None:
    scale = SCALE.within("3.")
    assert (scale.producer, scale.readers, scale.size) == ("3.qkv", ("3.o",), 2)

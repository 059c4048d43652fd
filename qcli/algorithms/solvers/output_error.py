"""The output error of a weight, computed from the Hessian of the layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(error: Tensor, hessian: Tensor | None) -> float:
    """`tr(E H E^T)`: the squared error of the outputs, a mean over tokens summed over channels; without H `||E||^2`.

    Args:
        error: `[out, in]`, the error of the weight.
        hessian: `[in, in]`; None: the identity.
    """
    return float(((error if hessian is None else error @ hessian) * error).sum(dtype=torch.float64))


def row_output_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """`diag(E H E^T)`: the same for each output channel, `[out]`."""
    return (error @ hessian * error).sum(1)

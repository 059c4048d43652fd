"""The output error of a weight, computed from the Hessian of the layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from qcli.algorithms.solvers.tiles import panels


def output_error(error: Tensor, hessian: Tensor | None) -> float:
    """`tr(E H E^T)`: the squared error of the outputs, a mean over tokens summed over channels; without H `||E||^2`.

    Args:
        error: `[out, in]`, the error of the weight.
        hessian: `[in, in]`; None: the identity.
    """
    return float(row_output_errors(error, hessian).sum(dtype=torch.float64))


def row_output_errors(error: Tensor, hessian: Tensor | None) -> Tensor:
    """`diag(E H E^T)`: the same for each output channel, `[out]`."""
    if hessian is None:
        return error.square().sum(1)
    total = error.new_zeros(len(error))
    for part in panels(hessian):  # H is symmetric: every pair of panels once
        products = error[:, part] @ hessian[part, part]
        if part.start:
            products.addmm_(error[:, : part.start], hessian[: part.start, part], alpha=2)
        total += products.mul_(error[:, part]).sum(1)
    return total

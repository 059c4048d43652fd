"""The target refit against ordinary least squares on the data."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.solvers.target import refit_target
from tests.algorithms.tensors import normal

INPUTS, OUTPUTS, TOKENS = 24, 10, 200


WEIGHT, X = normal(OUTPUTS, INPUTS), normal(TOKENS, INPUTS, seed=1) @ normal(INPUTS, INPUTS, seed=2)
QUANTIZED_X = X + 0.3 * normal(TOKENS, INPUTS, seed=3)
HESSIAN = QUANTIZED_X.T @ QUANTIZED_X / TOKENS


def test_refit_is_the_ridge_solution() -> None:
    residual_error = normal(TOKENS, OUTPUTS, seed=5)
    gap = ((X - QUANTIZED_X) @ WEIGHT.T + residual_error).T @ QUANTIZED_X / TOKENS
    target, used = refit_target(WEIGHT, HESSIAN, gap, ridge=0.3)
    assert used == 0.3
    root = (TOKENS * 0.3 * HESSIAN.diagonal().mean()).sqrt()
    rows = torch.cat([QUANTIZED_X, root * torch.eye(INPUTS)])  # the ridge as extra rows of data
    outputs = torch.cat([X @ WEIGHT.T + residual_error, root * WEIGHT.T])
    expected = torch.linalg.lstsq(rows.double(), outputs.double()).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=1e-3)


def test_equal_streams_leave_the_weight_as_it_is() -> None:
    target, _ = refit_target(WEIGHT, HESSIAN, torch.zeros(OUTPUTS, INPUTS), ridge=0.1)
    torch.testing.assert_close(target, WEIGHT, rtol=1e-3, atol=1e-3)


def test_ridge_is_raised_until_the_hessian_is_positive_definite() -> None:
    indefinite = torch.eye(INPUTS)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    target, used = refit_target(WEIGHT, indefinite, WEIGHT, ridge=0.1)
    assert used == pytest.approx(1.0)
    assert bool(target.isfinite().all())

"""Output errors from a Hessian against the outputs themselves."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.solvers.output_error import output_error, row_output_errors
from tests.algorithms.tensors import normal


def test_output_errors_are_means_over_tokens() -> None:
    x, error = normal(200, 24) @ normal(24, 24, seed=1), normal(10, 24, seed=2)
    hessian, expected = x.T @ x / len(x), (x @ error.T).square().mean(0)
    torch.testing.assert_close(row_output_errors(error, hessian), expected, rtol=1e-4, atol=1e-4)
    assert output_error(error, hessian) == pytest.approx(float(expected.sum()), rel=1e-4)


def test_without_a_hessian_it_is_the_error_of_the_weight() -> None:
    error = normal(10, 24)
    assert output_error(error, None) == pytest.approx(float(error.square().sum()), rel=1e-6)

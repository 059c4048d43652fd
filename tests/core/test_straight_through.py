"""The straight-through gradient."""

from __future__ import annotations

import torch

from qcli.core.straight_through import straight_through, through_rounding


def test_latent_gets_the_gradient_of_the_value_times_the_slope() -> None:
    value, latent = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    output = straight_through(value, latent, torch.tensor([1.0, 0.0, 0.5, 2.0]))
    assert torch.equal(output, value)
    output.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert value.grad is not None and value.grad.tolist() == [1, 2, 3, 4]
    assert latent.grad is not None and latent.grad.tolist() == [1, 0, 1.5, 8]


def test_slope_may_be_a_mask() -> None:
    value, latent = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    straight_through(value, latent, torch.tensor([True, False, True])).sum().backward()
    assert latent.grad is not None and latent.grad.tolist() == [1, 0, 1]


def test_rounding_is_exact_forward_and_unchanged_backward() -> None:
    exact = torch.tensor([0.1, 1e-9, -3.3], requires_grad=True)
    rounded = through_rounding(exact.detach().half().float(), exact)
    assert torch.equal(rounded.detach(), exact.detach().half().float())
    (rounded * torch.tensor([2.0, 3.0, 4.0])).sum().backward()
    assert exact.grad is not None
    assert exact.grad.tolist() == [2.0, 3.0, 4.0]

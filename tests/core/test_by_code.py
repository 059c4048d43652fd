"""Entries by code, and sums by code, against torch's gather and scatter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcli.core import by_code
from qcli.core.by_code import look_up, one_code_at_a_time, sums_by_code

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("entries", [2, 4, 16, 32])
def test_entries_and_their_gradients(entries: int) -> None:
    table = torch.randn(3, 5, entries, generator=GENERATOR, requires_grad=True)
    codes = torch.randint(entries, (3, 5, 40), generator=GENERATOR, dtype=torch.uint8)
    upstream = torch.randn(3, 5, 40, generator=GENERATOR)
    found, expected = look_up(table, codes), table.gather(2, codes.long())
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(values, table, upstream)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_many_codes_are_looked_up_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(7, 5, 4, generator=GENERATOR)
    codes = torch.randint(4, (7, 5, 40), generator=GENERATOR, dtype=torch.uint8)
    monkeypatch.setattr(by_code, "_AT_ONCE", 2 * 5 * 40)  # of two rows
    assert torch.equal(look_up(table, codes), table.gather(2, codes.long()))


@pytest.mark.parametrize("sums", [sums_by_code, one_code_at_a_time])
def test_sums_of_a_group(sums: Callable[[Tensor, Tensor, int], Tensor]) -> None:
    values, codes = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[3, 0, 3, 1]], dtype=torch.uint8)
    assert sums(values, codes, 4).tolist() == [[2.0, 8.0, 0.0, 5.0]]


def test_codes_wait_for_the_backward_pass_in_a_byte_each() -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    codes = torch.zeros(2, 3, 100, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        look_up(torch.ones(2, 3, 4, requires_grad=True), codes)
    assert sum(kept) == codes.nbytes

"""Batches that wait on the device or in host memory: the same values either way, and in host memory copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcli.utils.stored_batches import BatchMemory, StoredBatches

CPU = torch.device("cpu")
SAMPLES = torch.arange(7 * 3).view(7, 3)


def stored(*, on_host: bool) -> StoredBatches[Tensor]:
    return BatchMemory(CPU, on_host=on_host).store(SAMPLES.split(2))


@pytest.mark.parametrize("on_host", [False, True])
def test_batches_are_read_in_any_order_and_replaced(on_host: bool) -> None:
    batches = stored(on_host=on_host)
    assert len(batches) == 4
    for number in (0, 1, 3, 0, 2):
        assert torch.equal(batches[number], SAMPLES.split(2)[number])
    twin = batches.copy()
    for number, batch in enumerate(batches):  # the next one is under way when a batch is replaced
        batches[number] = batch + 100
        if number:
            batches[0] = batches[0] + 1
    assert torch.equal(torch.cat(list(batches))[2:], SAMPLES[2:] + 100)
    assert torch.equal(torch.cat(list(batches))[:2], SAMPLES[:2] + 103)
    assert torch.equal(torch.cat(list(twin)), SAMPLES)
    batches[1] = batches[0]
    assert torch.equal(batches[1], SAMPLES[:2] + 103)
    assert torch.equal(torch.cat(twin.waiting()), SAMPLES)


@pytest.mark.parametrize("on_host", [False, True])
def test_samples_are_gathered_across_batches(on_host: bool) -> None:
    assert torch.equal(stored(on_host=on_host).samples([6, 0, 3, 3]), SAMPLES[[6, 0, 3, 3]])


def test_structures_wait_like_tensors() -> None:
    outputs: StoredBatches[Any] = BatchMemory(CPU, on_host=True).store([(torch.ones(2), None, {"cache": 3}), None])
    first, second = outputs
    assert torch.equal(first[0], torch.ones(2))
    assert first[1:] == (None, {"cache": 3})
    assert second is None


def test_only_batches_in_host_memory_are_copied() -> None:
    batch = torch.ones(3)
    assert BatchMemory(CPU).store([batch])[0] is batch
    waiting = BatchMemory(CPU, on_host=True).store([batch])
    assert waiting[0] is not batch
    batch.zero_()
    assert torch.equal(waiting[0], torch.ones(3))

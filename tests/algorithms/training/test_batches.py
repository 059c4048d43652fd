"""Batches: every sample once an epoch, and the same ones for a step whenever it runs."""

from __future__ import annotations

import pytest
import torch

from qcli.algorithms.training.batches import BatchSampler, Sampling, Split
from qcli.utils.distributed import Processes


def test_every_epoch_visits_all_samples_once_in_its_own_order() -> None:
    sampler = BatchSampler(10, 2, "seed")
    indices = [index for step in range(10) for index in sampler.indices(step)]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]


def test_processes_have_equal_shares_of_every_batch() -> None:
    sampler = BatchSampler(19, 4, "seed")
    for count in (2, 4):
        shares = [Processes(torch.device("cpu"), rank, count).share(19) for rank in range(count)]
        for step in range(20):
            indices = sampler.indices(step)
            assert [sum(index in share for index in indices) for share in shares] == [4 // count] * count
    differences = {second - first for first, second, *_ in map(BatchSampler(20, 4, "seed").indices, range(5))}
    assert len(differences) > 1, "stretches have orders of their own"


def test_batches_depend_on_the_step_and_the_seed_alone() -> None:
    sampler = BatchSampler(5, 2, "seed")
    in_order = [sampler.indices(step) for step in range(4)]
    assert BatchSampler(5, 2, "seed").indices(3) == in_order[3]
    assert sorted(BatchSampler(2, 5, "seed").indices(0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert [BatchSampler(5, 2, "other").indices(step) for step in range(4)] != in_order


@pytest.mark.parametrize(("batch_tokens", "batch_size"), [(100, 3), (32, 1), (8, 1)])
def test_batch_size_follows_from_tokens(batch_tokens: int, batch_size: int) -> None:
    assert len(Sampling(batch_tokens, "seed").sampler(10, length=32).indices(0)) == batch_size


def test_split_maps_both_sides() -> None:
    assert Split([1, 2], [3]).map(len) == Split(2, 1)

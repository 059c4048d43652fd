"""Batches: every sample once an epoch, and the same ones for a step whenever it runs."""

from __future__ import annotations

import pytest

from qcli.algorithms.training.batches import BatchSampler, Sampling, Split


def test_every_epoch_visits_all_samples_once_in_its_own_order() -> None:
    sampler = BatchSampler(5, 2, "seed")
    indices = [index for step in range(5) for index in sampler.indices(step)]
    assert sorted(indices[:5]) == sorted(indices[5:]) == list(range(5))
    assert indices[:5] != indices[5:]


def test_batches_depend_on_the_step_and_the_seed_alone() -> None:
    sampler = BatchSampler(5, 2, "seed")
    in_order = [sampler.indices(step) for step in range(4)]
    assert BatchSampler(5, 2, "seed").indices(3) == in_order[3]
    assert [index for batch in in_order for index in batch][:7] == BatchSampler(5, 7, "seed").indices(0)
    assert [BatchSampler(5, 2, "other").indices(step) for step in range(4)] != in_order


@pytest.mark.parametrize(("batch_tokens", "batch_size"), [(100, 3), (32, 1), (8, 1)])
def test_batch_size_follows_from_tokens(batch_tokens: int, batch_size: int) -> None:
    assert len(Sampling(batch_tokens, "seed").sampler(10, length=32).indices(0)) == batch_size


def test_split_maps_both_sides() -> None:
    assert Split([1, 2], [3]).map(len) == Split(2, 1)

"""The stream of samples: identities that hold for every split and every restart."""

from __future__ import annotations

from itertools import islice

import pytest

from repagen.data.sampler import StreamBatchSampler, epoch_permutation, sample_indices
from repagen.errors import UserError

LENGTH, SEED = 13, 7


def test_an_epoch_is_a_permutation_of_seed_and_epoch() -> None:
    orders = [tuple(epoch_permutation(LENGTH, seed, epoch).tolist()) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(order) == list(range(LENGTH)) for order in orders)
    assert len(set(orders)) == 6


def test_the_stream_is_epoch_after_epoch_without_a_gap() -> None:
    stream = sample_indices(0, 3 * LENGTH, LENGTH, SEED)
    epochs = [epoch_permutation(LENGTH, SEED, epoch).tolist() for epoch in range(3)]
    assert stream == [index for epoch in epochs for index in epoch]


@pytest.mark.parametrize("position", [0, 5, 12, 13, 20, 26])
def test_the_stream_starts_anywhere(position: int) -> None:
    assert sample_indices(position, 9, LENGTH, SEED) == sample_indices(0, 40, LENGTH, SEED)[position : position + 9]


def test_a_far_position_costs_one_permutation() -> None:
    epoch_permutation.cache_clear()
    sample_indices(10**12 * LENGTH + 1, 5, LENGTH, SEED)
    assert epoch_permutation.cache_info().misses == 1


def micro_batches(**options: int) -> list[list[tuple[int, int]]]:
    return list(StreamBatchSampler(LENGTH, 8, SEED, num_steps=4, **options))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_every_split_delivers_the_same_steps_in_order(processes: int, accumulation: int) -> None:
    whole = micro_batches()
    parts = [
        micro_batches(process_index=rank, num_processes=processes, accumulation_steps=accumulation)
        for rank in range(processes)
    ]
    for step in range(4):
        joined = [
            pair
            for micro in range(accumulation)
            for rank in range(processes)
            for pair in parts[rank][step * accumulation + micro]
        ]
        assert joined == whole[step]


def test_positions_name_the_samples() -> None:
    for batch in micro_batches(start_step=3):
        for index, position in batch:
            assert sample_indices(position, 1, LENGTH, SEED) == [index]
    assert micro_batches(start_step=3)[0][0][1] == 24


def test_a_restart_continues_the_stream() -> None:
    whole = list(islice(StreamBatchSampler(LENGTH, 8, SEED), 6))
    assert list(islice(StreamBatchSampler(LENGTH, 8, SEED, start_step=2), 4)) == whole[2:]


@pytest.mark.parametrize(("batch", "processes", "accumulation"), [(8, 3, 1), (6, 2, 2), (0, 1, 1)])
def test_uneven_splits_are_refused(batch: int, processes: int, accumulation: int) -> None:
    with pytest.raises(UserError, match="multiples of"):
        StreamBatchSampler(LENGTH, batch, SEED, num_processes=processes, accumulation_steps=accumulation)

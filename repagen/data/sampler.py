"""The endless stream of training samples: which sample stands at which position.

The stream is epoch after epoch, each a permutation that depends on (seed, epoch) alone. Positions run through from one
epoch to the next, so no sample is dropped and a run continues at any position at the cost of one permutation. An
optimiser step takes the next `global_batch_size` positions, whatever the number of processes and micro-batches they
are split over. Where samples are of several sizes (`BucketedOrder`), a step takes samples of one size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch.utils.data import Sampler

from repagen.errors import UserError
from repagen.randomness import generator_for


def _shuffled(dataset_length: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(dataset_length, generator=generator_for(seed, "epoch", epoch))


@lru_cache(maxsize=2)
def epoch_permutation(dataset_length: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of the samples in an epoch, (dataset_length,) int64."""
    return _shuffled(dataset_length, seed, epoch)


def sample_indices(position: int, count: int, dataset_length: int, seed: int) -> list[int]:
    """Return the samples at positions [position, position + count) of the stream."""
    return _in_stream(position, count, dataset_length, partial(epoch_permutation, dataset_length, seed))


def _in_stream(position: int, count: int, length: int, permutation: Callable[[int], torch.Tensor]) -> list[int]:
    """=> the samples at positions of the stream that goes through one permutation of the samples per epoch."""
    places = (divmod(place, length) for place in range(position, position + count))
    return [int(permutation(epoch)[offset]) for epoch, offset in places]


class BucketedOrder:
    """Which samples each step takes, where those of a step must be of one bucket.

    Each bucket has a stream of its own, made as that of a whole dataset, and a step takes the next `batch_size`
    samples of one of them. By the end of epoch e a bucket of n samples has had floor((e + 1) n / batch_size) steps:
    what does not fill a step waits for the next epoch, so no sample is left out, or repeated before all others of its
    bucket had their turn. Within an epoch the steps of the buckets are shuffled. Everything is a function of (seed,
    step); with a single bucket it is the plain stream.
    """

    def __init__(self, buckets: torch.Tensor, batch_size: int, seed: int) -> None:
        """Divide the samples.

        Args:
            buckets: bucket of every sample (N,) int64.
            batch_size: samples per step.
            seed: the run's seed.
        """
        self._members = [(buckets == bucket).nonzero().flatten() for bucket in buckets.unique().tolist()]
        self._batch_size = batch_size
        # Two epochs of every bucket: steps go from bucket to bucket.
        self._permutations = [lru_cache(maxsize=2)(partial(_shuffled, len(m), seed)) for m in self._members]
        self._steps = lru_cache(maxsize=2)(partial(self._shuffled_steps, seed))

    def indices(self, step: int, first: int, count: int) -> list[int]:
        """Return `count` samples of a step from the one numbered `first` on."""
        # A bucket's share of the steps is rounded down, by less than one each.
        bound = (step + 1 + len(self._members)) * self._batch_size // sum(map(len, self._members)) + 2
        epoch = bisect_right(range(bound), step, key=lambda epoch: sum(self._steps_before(epoch))) - 1
        order, offset = self._steps(epoch), step - sum(self._steps_before(epoch))
        bucket = int(order[offset])
        turn = self._steps_before(epoch)[bucket] + int((order[:offset] == bucket).sum())
        members = self._members[bucket]
        position = turn * self._batch_size + first
        own = _in_stream(position, count, len(members), self._permutations[bucket])
        return members[own].tolist()

    def _steps_before(self, epoch: int) -> list[int]:
        """=> the steps that each bucket has had when an epoch begins."""
        return [epoch * len(members) // self._batch_size for members in self._members]

    def _shuffled_steps(self, seed: int, epoch: int) -> torch.Tensor:
        """=> the buckets of an epoch's steps, in order."""
        pairs = zip(self._steps_before(epoch), self._steps_before(epoch + 1), strict=True)
        steps = torch.tensor([after - before for before, after in pairs])
        order = torch.arange(len(steps)).repeat_interleave(steps)
        return order[torch.randperm(len(order), generator=generator_for(seed, "bucket steps", epoch))]


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one process, as lists of (sample, position), from a step on and without end.

    Micro-batch m of process p holds, of the positions of step s, the block m * num_processes + p; so the samples of a
    step are the same for every split, and their order over (micro-batch, process) too. The loader is meant to be used
    as it is: `Accelerator.prepare` would split it a second time.
    """

    def __init__(
        self,
        dataset_length: int,
        global_batch_size: int,
        seed: int,
        *,
        start_step: int = 0,
        num_steps: int | None = None,
        accumulation_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        buckets: torch.Tensor | None = None,
    ) -> None:
        """Describe the split.

        Args:
            dataset_length: number of samples in the dataset.
            global_batch_size: samples per optimiser step over all processes and micro-batches.
            seed: the run's seed.
            start_step: optimiser steps already taken.
            num_steps: optimiser steps to deliver; no end when not given.
            accumulation_steps: micro-batches per optimiser step.
            process_index: this process.
            num_processes: number of processes.
            buckets: bucket of every sample (dataset_length,) int64, where the samples of a step, over all processes,
                must be of one; see `BucketedOrder`.

        Raises:
            UserError: the batch does not divide evenly.
        """
        parts = accumulation_steps * num_processes
        if global_batch_size < 1 or parts < 1 or global_batch_size % parts:
            raise UserError(
                f"batch size: {global_batch_size} samples per step do not divide over {num_processes} processes x "
                f"{accumulation_steps} micro-batches; allowed: multiples of {parts}"
            )
        self.dataset_length = dataset_length
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps
        self.accumulation_steps = accumulation_steps
        self.process_index = process_index
        self.num_processes = num_processes
        self._order = None if buckets is None else BucketedOrder(buckets, global_batch_size, seed)

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch of one process."""
        return self.global_batch_size // (self.accumulation_steps * self.num_processes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            for micro_batch in range(self.accumulation_steps):
                block = micro_batch * self.num_processes + self.process_index
                yield self._micro_batch(step, block * self.micro_batch_size)
            step += 1

    def _micro_batch(self, step: int, start: int) -> list[tuple[int, int]]:
        """=> (sample, position) of a step's samples from the one numbered `start` on."""
        count, first = self.micro_batch_size, step * self.global_batch_size + start
        if self._order is None:
            indices = sample_indices(first, count, self.dataset_length, self.seed)
        else:
            indices = self._order.indices(step, start, count)
        return list(zip(indices, range(first, first + count), strict=True))

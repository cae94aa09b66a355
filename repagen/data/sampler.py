"""The endless stream of training samples: which sample stands at which position.

The stream is epoch after epoch, each a permutation that depends on (seed, epoch) alone. Positions run through from one
epoch to the next, so no sample is dropped and a run continues at any position at the cost of one permutation. An
optimiser step takes the next `global_batch_size` positions, whatever the number of processes and micro-batches they
are split over.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.data import Sampler

from repagen.errors import UserError
from repagen.randomness import generator_for


@lru_cache(maxsize=2)
def epoch_permutation(dataset_length: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the order of the samples in an epoch, (dataset_length,) int64."""
    return torch.randperm(dataset_length, generator=generator_for(seed, "epoch", epoch))


def sample_indices(position: int, count: int, dataset_length: int, seed: int) -> list[int]:
    """Return the samples at positions [position, position + count) of the stream."""
    indices = []
    for place in range(position, position + count):
        epoch, offset = divmod(place, dataset_length)
        indices.append(int(epoch_permutation(dataset_length, seed, epoch)[offset]))
    return indices


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

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch of one process."""
        return self.global_batch_size // (self.accumulation_steps * self.num_processes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            for micro_batch in range(self.accumulation_steps):
                block = micro_batch * self.num_processes + self.process_index
                first = step * self.global_batch_size + block * self.micro_batch_size
                indices = sample_indices(first, self.micro_batch_size, self.dataset_length, self.seed)
                yield list(zip(indices, range(first, first + self.micro_batch_size), strict=True))
            step += 1

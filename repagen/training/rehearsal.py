"""A trial of a training step before the first one: the micro-batch that fits, the memory and the time it takes."""

from __future__ import annotations

import datetime
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size, gather_object
from torch import nn

from repagen.data import SampleDataset
from repagen.errors import UserError
from repagen.training.ema import Ema
from repagen.training.optimizer import OptimizerConfig, state_bytes
from repagen.training.run import Batch, Run

_GIGABYTE = 1e9


class FoundMicroBatch:
    """The size of the micro-batches that were found to fit: a continued run tries it first, and so repeats every bit.

    Attributes:
        size: samples per forward pass of one process; None: not found yet.
    """

    def __init__(self) -> None:
        self.size: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """=> {"size": size}."""
        return {"size": self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.size = state["size"]


@dataclass(frozen=True)
class Rehearsal:
    """Tries a step of a training, which it leaves as it was, and says what was found.

    Attributes:
        run: the run.
        dataset: of the training.
        try_batch: goes forward and back with a micro-batch in this process, and drops the gradients.
        trained: holds the parameters that are trained.
        networks: all of the training, for the memory of their weights.
        optimizer: settings of the optimiser.
        ema: the averages.
    """

    run: Run
    dataset: SampleDataset
    try_batch: Callable[[Batch], None]
    trained: nn.Module
    networks: Sequence[nn.Module]
    optimizer: OptimizerConfig
    ema: Ema

    def __call__(self, start_step: int, found: FoundMicroBatch) -> None:
        """Choose the micro-batches where they are `auto`, and tell parameters, memory and time.

        Args:
            start_step: optimiser steps already done; after the last one nothing is tried.
            found: what a checkpoint knows of the micro-batches; takes what is found now.

        Raises:
            UserError: a step does not fit into memory.
        """
        remaining = self.run.config.max_steps - start_step
        if remaining <= 0:
            return
        seconds = self._fit(found) if self.run.config.micro_batch_size == "auto" else self._refuse_too_large()
        self._tell(seconds * self.run.plan.accumulation, remaining)

    def _fit(self, found: FoundMicroBatch) -> float:
        """Take the largest micro-batch that fits on every process: => seconds of one."""
        share = self.run.plan.accumulation * self.run.plan.micro_size
        first = found.size if found.size and share % found.size == 0 else share
        sizes = iter([size for size in range(first - 1, 0, -1) if share % size == 0])
        tried = first

        def smaller() -> int:
            nonlocal tried
            tried = next(sizes, 0)
            return tried

        search: Any = find_executable_batch_size(self._try, first, smaller)
        try:
            seconds = search()
        except RuntimeError as error:
            if tried:
                raise
            raise UserError(
                f"micro_batch_size: not even one sample fits into the memory of {self._place()}; set "
                "gradient_checkpointing=true and precision=bf16, or for a generator take mode=lora or mode=labels"
            ) from error
        sizes_found = gather_object([tried]) if self.run.plan.processes > 1 else [tried]
        found.size = min(sizes_found)
        self.run.plan = self.run.plan.with_micro_size(found.size)
        self.run.notice("%s", self.run.plan)
        return seconds * found.size / tried

    def _refuse_too_large(self) -> float:
        """Try the micro-batch that is configured: => its seconds."""
        size = self.run.plan.micro_size
        try:
            return self._try(size)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"micro_batch_size: {size} samples do not fit into the memory of {self._place()}; set "
                "micro_batch_size=auto or a smaller divisor of the batch, or gradient_checkpointing=true"
            ) from error

    def _try(self, batch_size: int) -> float:
        """Go twice forward and back with so many samples, beside all that training will hold: => seconds of one."""
        device = self.run.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batch = self.run.first_samples(self.dataset, batch_size)
        coming = self._coming_state() if device.type == "cuda" else None
        started = 0.0
        for _ in range(2):  # the first pass chooses kernels and fills caches
            started = time.perf_counter()
            self.try_batch(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        del coming
        return time.perf_counter() - started

    def _coming_state(self) -> torch.Tensor:
        """Take the memory that the optimiser takes with its first step, and the exchange of gradients."""
        size = state_bytes([self.trained], self.optimizer)
        if self.run.plan.processes > 1:
            size += sum(p.nbytes for p in self.trained.parameters() if p.requires_grad)
        return torch.empty(size, dtype=torch.uint8, device=self.run.device)

    def _tell(self, seconds: float, remaining: int) -> None:
        parameters = {id(p): p for network in self.networks for p in network.parameters()}.values()
        everything = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in self.trained.parameters() if p.requires_grad)
        self.run.notice("parameters: %s trained of %s", f"{trained:,}", f"{everything:,}")
        self.run.notice(
            "memory: networks %s, optimiser %s, averages %s; %s",
            _gigabytes(sum(p.nbytes for p in parameters)),
            _gigabytes(state_bytes([self.trained], self.optimizer)),
            _gigabytes(_tensor_bytes(self.ema.state_dict()["shadow"].values())),
            self._peak(),
        )
        expected = datetime.timedelta(seconds=round(seconds * remaining))
        self.run.notice("time: %.3g s a step in the trial, so about %s for %d steps", seconds, expected, remaining)

    def _peak(self) -> str:
        device = self.run.device
        if device.type == "cuda":
            peak, total = (
                torch.cuda.max_memory_allocated(device),
                torch.cuda.get_device_properties(device).total_memory,
            )
            return f"{_gigabytes(peak)} at the peak of a trial step, of {_gigabytes(total)} on {self._place()}"
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return f"{_gigabytes(peak)} at the peak of the process until after a trial step"

    def _place(self) -> str:
        device = self.run.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"


def _tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _gigabytes(size: int) -> str:
    return f"{size / _GIGABYTE:.2f} GB"

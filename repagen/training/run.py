"""What every training program shares: processes, batches, precision, progress, logs, checkpoints and clean stops.

A program reads from top to bottom:

    with open_run(config, "generator") as run:
        parts = {"model": model, "optimizer": optimizer, "ema": ema}
        for step, micro_batches in run.steps(dataset, run.restore(parts, facts)):
            ...                                     # reports that belong before the step
            run.save_if_due(step, parts)
            if micro_batches is None:               # the last pass only reports and saves
                break
            for batch in run.accumulate(model, micro_batches):
                run.backward(loss_of(batch))        # mean over the micro-batch
            ...
            run.log(step + 1, row)

Nothing random is kept between steps: every draw is keyed by the run's seed and the sample's position in the stream, so
a resumed run, another number of processes and another micro-batch size see the same samples, times and noise.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import nn
from tqdm.auto import tqdm

from repagen.config import flatten, save_config, to_plain, value_at
from repagen.data import SampleDataset, StreamBatchSampler, load_batches, load_first
from repagen.errors import UserError, naming
from repagen.hub.publishing import check_repository
from repagen.randomness import derived_seed, generator_for
from repagen.training.checkpoint import Checkpoint, CheckpointFolder, folder_lock, read_checkpoint
from repagen.training.launch import RunStopped, StopFlag, environment, start_accelerator, stop_signals
from repagen.training.log import MetricsLog, MetricValue
from repagen.training.run_config import BatchPlan, RunConfig

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
Result = TypeVar("Result")

# Keys that may change when a run continues: they do not touch what is computed, or only how long.
_MAY_CHANGE = (
    "output_dir",
    "max_steps",
    "micro_batch_size",
    "num_workers",
    "data.max_bad_images",
    "data.index_folder",
    "data.verify_shards",
    "device",
    "compile",
    "gradient_checkpointing",
    "resume",
    "checkpoint",
    "evaluation",
    "sample",
    "sampler",
    "log_with",
    "progress_bar",
    "push_to_hub",
    "hub_private",
    "hub_revision",
    "recipe",
)
# Where data and frozen models lie; the facts that the program compares say whether they are the same.
_PLACES = re.compile(
    r"data\.path|pipeline|revision|autoencoder\.(path|subfolder|revision)|transformer\.(pretrained|revision)"
    r"|alignment\.(targets\.\d+|attention|class_token)\.(encoder|revision)|text\.(encoder(\.\d+)?|revision|cache)"
)


class Savable(Protocol):
    """Anything with a state dict: modules, optimisers, the EMA."""

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state: Any, /) -> Any: ...  # noqa: D102


@contextmanager
def open_run(config: RunConfig, program: str) -> Iterator[Run]:
    """Open the output folder for one run: lock it, start the processes' group and the logs, and close all at the end.

    Raises:
        UserError: if another run holds the folder, or a setting cannot be met on this machine.
        RunStopped: out of the context, when a signal stopped the run after its checkpoint.
    """
    accelerator = start_accelerator(config)
    try:
        with stop_signals() as stop:
            run = Run(config, program, accelerator, stop)
            with run.lock(), closing(run):
                run.start()
                yield run
    finally:
        accelerator.end_training()  # without it the process aborts at its exit


class Run:
    """One training run in one output folder; made by `open_run`.

    Attributes:
        config: its configuration.
        folder: the output folder.
        accelerator: of accelerate.
        device: where tensors live.
        plan: how the global batch is split.
    """

    def __init__(self, config: RunConfig, program: str, accelerator: Accelerator, stop: StopFlag) -> None:
        self.config = config
        self.program = program
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.folder = Path(config.output_dir).expanduser()
        self.plan = BatchPlan.from_config(config, accelerator.num_processes)
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", config.checkpoint.keep)
        self._stop = stop
        self._metrics = MetricsLog(self.folder / "metrics.jsonl")
        self._facts: dict[str, Any] = {}
        self._saved_step = -1
        self._progress: tqdm[Any] | None = None
        self._row_time = time.perf_counter()

    # --- set-up ----------------------------------------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and shows progress."""
        return bool(self.accelerator.is_main_process)

    def notice(self, message: str, *values: object) -> None:
        """Tell the user something, once, from the main process."""
        if self.is_main:
            logger.info(message, *values)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Run `function` on the main process alone; every process gets its result, or its `UserError`."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [function(), None]
            except UserError as error:
                outcome = [None, str(error)]
        if self.plan.processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the output folder's lock (taken by the main process)."""
        held: AbstractContextManager[None] = nullcontext()

        def take() -> None:
            nonlocal held
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held = folder_lock(self.folder)
                held.__enter__()
            except OSError as error:
                held = nullcontext()
                raise UserError(f"output_dir: {self.folder} cannot be used ({error.strerror})") from None

        self.on_main(take)
        try:
            yield
        finally:
            held.__exit__(None, None, None)

    def start(self) -> None:
        """Sweep what killed saves left, seed the initial weights, and start the trackers."""
        self.on_main(self.checkpoints.sweep)
        self.on_main(self._check_repository)
        torch.manual_seed(derived_seed(self.config.seed, "initial weights"))
        if self.config.log_with and self.is_main:
            flat = {key: value for key, value in flatten(to_plain(self.config)).items() if value not in ({}, [], None)}
            self.accelerator.init_trackers(f"repagen-{self.program}", config=flat)
        threads = torch.get_num_threads()
        self.notice("%s on %s, %s, %d threads", self.program, self.device, self.config.precision, threads)
        self.notice("%s", self.plan)

    def _check_repository(self) -> None:
        """Find out before the training what would keep its result from the Hub."""
        config = self.config
        if config.push_to_hub is not None:
            with naming({"": "push_to_hub: "}):
                check_repository(
                    config.push_to_hub,
                    private=config.hub_private,
                    revision=config.hub_revision,
                    pipeline=config.releases_pipeline,
                )

    def close(self) -> None:
        """Close the log and the progress bar."""
        if self._progress is not None:
            self._progress.close()
        self._metrics.close()

    def wrap(self, module: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:
        """Move a module to the device and, with several processes, wrap it so that gradients are averaged."""
        module.to(self.device)
        if self.plan.processes == 1:
            return module
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)
        return self.accelerator.prepare_model(module)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass; losses belong outside or in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def generators(self, purpose: str, batch: Batch) -> list[torch.Generator]:
        """One generator per sample of a batch, on the device, keyed by (seed, purpose, position in the stream)."""
        positions = batch["position"].tolist()
        return [generator_for(self.config.seed, purpose, position, device=self.device) for position in positions]

    # --- resume ----------------------------------------------------------------------------------------------------

    def restore(self, parts: Mapping[str, Savable], facts: Mapping[str, Any]) -> int:
        """Load the checkpoint that the run continues from, if any.

        Args:
            parts: name => what holds the training state.
            facts: what must be the same when the run continues although no key of the configuration says so (sizes and
                fingerprints of data and frozen models), as plain values.

        Returns:
            Optimiser steps already done; 0 for a new run.

        Raises:
            UserError: if a key or fact changed that may not, or no checkpoint is whole.
        """
        self._facts = json.loads(json.dumps(facts))  # as it comes back from a checkpoint
        path = self.on_main(self._first_checkpoint_path)
        step = 0
        if path is not None:
            checkpoint = read_checkpoint(Path(path), verify=False)
            self._compare(checkpoint)
            for name, part in parts.items():
                part.load_state_dict(checkpoint.part(name))
            step = checkpoint.step
            self.notice("continuing after step %d from %s", step, path)
        self.on_main(lambda: self._begin_logs(step))
        self._saved_step = step if path is not None else -1
        return step

    def _first_checkpoint_path(self) -> str | None:
        own = self.checkpoints.newest()
        resume = self.config.resume
        if resume == "never" and own is not None:
            raise UserError(
                f"output_dir: {self.folder} already holds checkpoints and resume=never; choose another folder, or "
                "resume=latest"
            )
        if own is not None or resume in ("latest", "never"):
            return str(own.path) if own is not None else None
        if not Path(resume).is_dir():
            raise UserError(f"resume: {resume!r} is neither latest, nor never, nor a checkpoint folder")
        return str(read_checkpoint(Path(resume)).path)

    def _begin_logs(self, step: int) -> None:
        self._metrics.open_at(step)
        save_config(self.config, self.folder / "config.yaml")

    def _compare(self, checkpoint: Checkpoint) -> None:
        old, new = flatten(checkpoint.info["config"]), flatten(to_plain(self.config))
        for key in sorted(old.keys() | new.keys()):
            before, now = value_at(old, key), value_at(new, key)
            if before == now:
                continue
            if not {key, key.split(".")[0]} & set(_MAY_CHANGE) and not _PLACES.fullmatch(key):
                raise UserError(
                    f"{key}: {before!r} in {checkpoint.path} but {now!r} now; a run cannot continue "
                    "with it changed: set it back, or choose another output_dir"
                )
            self.notice("continuing with %s=%r (was %r)", key, now, before)
        for name, value in self._facts.items():
            if checkpoint.info["facts"].get(name) != value:
                raise UserError(
                    f"{name}: {checkpoint.info['facts'].get(name)!r} in {checkpoint.path} but {value!r} now; the run "
                    "cannot continue with other data or models: restore them, or choose another output_dir"
                )
        for name, value in environment(self.plan.processes).items():
            if checkpoint.info["environment"].get(name) != value:
                was = checkpoint.info["environment"].get(name)
                self.notice("%s is %s (was %s): results may differ in the last bits", name, value, was)

    def save_if_due(self, step: int, parts: Mapping[str, Savable]) -> None:
        """Write a checkpoint every so many steps, at the end, and when a signal asked the run to stop.

        Raises:
            RunStopped: after the checkpoint that a signal asked for.
            UserError: if the checkpoint cannot be written.
        """
        stopping = self._any_process_stopping()
        last = step >= self.config.max_steps
        due = step > 0 and step % self.config.checkpoint.every_steps == 0
        if (due or stopping or last) and step != self._saved_step:
            self.on_main(lambda: self._save(step, parts))
            self._saved_step = step
        if stopping and not last:
            raise RunStopped(f"stopped after step {step} of {self.config.max_steps}; the same command again continues")

    def _save(self, step: int, parts: Mapping[str, Savable]) -> None:
        self._metrics.sync()
        states = {name: part.state_dict() for name, part in parts.items()}
        info = {
            "program": self.program,
            "config": to_plain(self.config),
            "facts": self._facts,
            "environment": environment(self.plan.processes),
        }
        self.checkpoints.save(step, states, info)

    def _any_process_stopping(self) -> bool:
        if self.plan.processes == 1:
            return self._stop.requested
        flag = torch.tensor(float(self._stop.requested), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    # --- the loop --------------------------------------------------------------------------------------------------

    def steps(self, dataset: SampleDataset, start_step: int) -> Iterator[tuple[int, Iterator[Batch] | None]]:
        """Steps start_step ... max_steps, each with its micro-batches on the device; the last one has None.

        Micro-batches are the dataset's items collated, with `index` (of the sample) and `position` (in the stream).
        """
        sampler = StreamBatchSampler(
            len(dataset),
            self.plan.global_size,
            self.config.seed,
            start_step=start_step,
            num_steps=self.config.max_steps - start_step,
            accumulation_steps=self.plan.accumulation,
            process_index=self.accelerator.process_index,
            num_processes=self.plan.processes,
            buckets=dataset.buckets,
        )
        pin = self.device.type == "cuda"
        workers = self.config.num_workers
        batches = load_batches(dataset, sampler, self.config.seed, num_workers=workers, pin_memory=pin)
        self._progress = self._progress_bar(start_step)
        self._row_time = time.perf_counter()
        for step in range(start_step, self.config.max_steps):
            torch.manual_seed(derived_seed(self.config.seed, "step", step, self.accelerator.process_index))
            yield step, (self._to_device(batch) for batch in islice(batches, self.plan.accumulation))
        yield max(self.config.max_steps, start_step), None

    def _progress_bar(self, start_step: int) -> tqdm[Any]:
        return tqdm(
            total=self.config.max_steps,
            initial=start_step,
            desc=self.program,
            unit="step",
            disable=not (self.is_main and self.config.progress_bar),
            dynamic_ncols=True,
        )

    def first_samples(self, dataset: SampleDataset, count: int) -> Batch:
        """The first samples of the stream, of the largest size, as one micro-batch on the device."""
        return self._to_device(load_first(dataset, count, self.config.seed))

    def _to_device(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.device, non_blocking=True)
        if isinstance(value, dict):
            return {
                name: child if name in ("index", "position") else self._to_device(child)
                for name, child in value.items()
            }
        return [self._to_device(child) for child in value] if isinstance(value, list) else value

    def due(self, every_steps: int, step: int) -> bool:
        """Whether what happens every so many steps (0: never), and at the end, happens after `step` steps."""
        return every_steps > 0 and step > 0 and (step % every_steps == 0 or step == self.config.max_steps)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Stop the clock of the rows: what happens within is not training."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._row_time += time.perf_counter() - started

    def accumulate(self, module: nn.Module, micro_batches: Iterator[Batch]) -> Iterator[Batch]:
        """Go through a step's micro-batches; gradients of `module` are exchanged only in the last backward pass."""
        for index, batch in enumerate(micro_batches):
            with self.accelerator.no_sync(module) if index + 1 < self.plan.accumulation else nullcontext():
                yield batch

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a micro-batch's mean loss, weighted by its share of the global batch.

        All micro-batches are of one size and processes are averaged, so the share is 1 / accumulation.
        """
        self.accelerator.backward(loss / self.plan.accumulation)

    def mean(self, values: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
        """Average named scalars over a step's micro-batches and over all processes (one synchronisation)."""
        names = list(values[0])
        stacked = torch.stack(
            [torch.stack([entry[name].detach().float() for name in names]) for entry in values]
        ).mean(0)
        if self.plan.processes > 1:
            stacked = self.accelerator.reduce(stacked, "mean")
        return dict(zip(names, stacked.tolist(), strict=True))

    def stop_if_not_finite(
        self,
        step: int,
        values: Mapping[str, float],
        dataset: SampleDataset,
        samples: Sequence[tuple[Batch, torch.Tensor]],
    ) -> None:
        """Stop every process before the optimiser step if a loss or gradient norm is not finite.

        Args:
            step: optimiser steps done so far.
            values: averaged over all processes, so that all decide alike.
            dataset: names the samples.
            samples: this process's micro-batches, each with the loss of every sample (B,).

        Raises:
            UserError: naming the step, the values and the samples: those with a loss that is not finite, or else the
                whole batch.
        """
        bad = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        indices = torch.cat([batch["index"].cpu() for batch, _ in samples])
        broken = torch.cat([~torch.isfinite(losses.detach()).cpu() for _, losses in samples])
        local = [indices.tolist(), indices[broken].tolist()]
        everywhere = gather_object([local]) if self.plan.processes > 1 else [local]
        named = [index for _, own in everywhere for index in own] or [
            index for all_, _ in everywhere for index in all_
        ]
        shown = ", ".join(dataset.describe(index) for index in named[:8]) + (", ..." if len(named) > 8 else "")
        raise UserError(
            f"step {step}: {', '.join(bad)} is not finite; stopped before the optimiser step, the last checkpoint is "
            f"sound; samples: {shown}; look at them, lower optimizer.learning_rate or use precision=fp32"
        )

    def log(self, step: int, row: Mapping[str, MetricValue]) -> None:
        """Record the row of the step just done: file, trackers and progress bar.

        Args:
            step: optimiser steps done.
            row: what the program reports; step, images and times are added here.
        """
        now = time.perf_counter()
        seconds, self._row_time = now - self._row_time, now
        rate = self.plan.global_size / seconds
        head = {"step": step, "images": step * self.plan.global_size}
        if self.is_main:
            self._metrics.append({**head, **row, "time_s": round(seconds, 6), "images_per_s": round(rate, 2)})
        if self.config.log_with:
            self.accelerator.log({**row, "images": head["images"], "images_per_s": rate}, step=step)
        if self._progress is not None:
            self._progress.set_postfix_str(f"{rate:.0f} images/s, loss {row['loss']:.4f}", refresh=False)
            self._progress.update()

"""The part of a configuration that all training programs share, and how a global batch is split."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from repagen.config import require
from repagen.errors import UserError
from repagen.training.checkpoint import CheckpointConfig


@dataclass
class RecipeConfig:
    """What a preset says about itself; listed by `repagen recipes`.

    Attributes:
        title: one line.
        paper: title and arXiv number.
        program: the program that runs it.
        cost: images, steps, hardware.
        expected: result to expect, with its source.
    """

    title: str = ""
    paper: str = ""
    program: Literal["generator", "text_to_image", "decoder", "end_to_end", "finetune"] = "generator"
    cost: str = ""
    expected: str = ""


@dataclass(kw_only=True)
class RunConfig:
    """The part of a configuration that all training programs share.

    Attributes:
        recipe: what a preset says about itself; without effect.
        output_dir: folder of the run; created if needed. The same command again continues in it.
        seed: of every random draw.
        max_steps: optimiser steps.
        global_batch_size: samples per optimiser step, over all processes and accumulation.
        micro_batch_size: samples per forward pass and process; None: all of a process's share at once. The rest of the
            batch is accumulated, which gives the same losses. Fine-tuning takes `auto` too: the most that fit into
            memory, found by trial.
        precision: `fp32`; `tf32` (matmuls of float32 in TF32 where the GPU can); `bf16` (autocast; losses, norms and
            parameters stay float32).
        device: `auto` takes the GPU if there is one.
        deterministic: deterministic GPU kernels, for bit-equal restarts on a GPU.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile: torch.compile, block by block.
        num_workers: processes that load images; 0 loads in the training process.
        resume: `latest` continues from the newest whole checkpoint in output_dir, if there is one; `never` refuses to
            run when there is one; a path starts a new output_dir from that checkpoint folder.
        checkpoint: when checkpoints are written.
        log_with: trackers of accelerate (tensorboard, wandb, ...), beside the `metrics.jsonl` that is always written.
        progress_bar: show a progress bar.
        push_to_hub: publish the release at the end, as the Hub repository "org/name"; whether that is possible is
            checked before the training. The token is that of `hf auth login` or HF_TOKEN.
        hub_private: only the repository's owner sees it.
        hub_revision: branch of it to commit to; None: the main branch.
    """

    finds_micro_batch: ClassVar[bool] = False

    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    output_dir: str
    seed: int = 0
    max_steps: int
    global_batch_size: int
    micro_batch_size: int | Literal["auto"] | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    deterministic: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    num_workers: int = 0
    resume: str = "latest"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_with: list[str] = field(default_factory=list)
    progress_bar: bool = True
    push_to_hub: str | None = None
    hub_private: bool = False
    hub_revision: str | None = None

    @property
    def releases_pipeline(self) -> bool:
        """Whether the run hands out a pipeline, not a model or an adapter alone."""
        return True

    def validate(self) -> None:
        """Check the ranges."""
        require(bool(self.output_dir.strip()), "output_dir", self.output_dir, "the path of a folder")
        require(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2**63")
        require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        require(self.global_batch_size >= 1, "global_batch_size", self.global_batch_size, "at least 1")
        if self.micro_batch_size == "auto":
            require(self.finds_micro_batch, "micro_batch_size", "auto", "a number here; auto is for fine-tuning")
        elif self.micro_batch_size is not None:
            fits = self.micro_batch_size >= 1 and self.global_batch_size % self.micro_batch_size == 0
            allowed = f"a divisor of global_batch_size={self.global_batch_size}"
            require(fits, "micro_batch_size", self.micro_batch_size, allowed)
        require(self.num_workers >= 0, "num_workers", self.num_workers, "at least 0")
        pushed = self.push_to_hub
        named = pushed is None or re.fullmatch(r"[\w.-]+/[\w.-]+", pushed) is not None
        require(named, "push_to_hub", pushed, "a repository of the Hub as org/name")
        for key in ("hub_private", "hub_revision"):
            given = getattr(self, key)
            require(pushed is not None or not given, key, given, "left out without push_to_hub")


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is split: `global_size` = `processes` x `accumulation` x `micro_size` samples."""

    global_size: int
    processes: int
    accumulation: int

    @classmethod
    def from_config(cls, config: RunConfig, processes: int) -> BatchPlan:
        """Plan the split, of `auto` the largest; refused if the global batch does not divide."""
        share, rest = divmod(config.global_batch_size, processes)
        given = None if config.micro_batch_size == "auto" else config.micro_batch_size
        micro_size = given or share
        if rest or micro_size > share or share % micro_size:
            raise UserError(
                f"global_batch_size: {config.global_batch_size} does not split into {processes} processes with "
                f"micro_batch_size={given}; choose a multiple of {processes * (micro_size or 1)}"
            )
        return cls(config.global_batch_size, processes, share // micro_size)

    @property
    def micro_size(self) -> int:
        """Samples per forward pass of one process."""
        return self.global_size // (self.processes * self.accumulation)

    def with_micro_size(self, micro_size: int) -> BatchPlan:
        """The plan with other micro-batches; `micro_size` divides a process's share."""
        return replace(self, accumulation=self.global_size // (self.processes * micro_size))

    def __str__(self) -> str:
        return (
            f"global batch {self.global_size} = {self.processes} process(es) x {self.accumulation} accumulated x "
            f"{self.micro_size} samples"
        )

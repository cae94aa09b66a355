"""What ties autoencoder and generator together in end-to-end training (REPA-E, arXiv 2504.10483).

Three updates a step, on the same draw z from the posterior, the same times and the same noise:

1. Autoencoder: L1 + LPIPS + KL + GAN + w align, where align is the alignment loss of the generator on
   x = (z - running mean) / sqrt(running variance + eps), carried back through the generator's first blocks to z. The
   generator and its projectors are constants here, and labels are not dropped.
2. Discriminator: on the images and step 1's reconstructions.
3. Generator and projectors: velocity loss + w' align on x = (stop(z) - mean) / sqrt(variance + eps), mean and variance
   of the batch, which then move the running ones. The autoencoder gets no gradient.

Batch statistics are those of the whole global batch: summed over micro-batches and processes, since z is a constant in
3 and the running ones are constants in 1. (The released code synchronises processes, not micro-batches.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repagen.data import SampleDataset
from repagen.models.autoencoder_svg import channel_sums
from repagen.models.latents import kl_statistics
from repagen.training.conditioning import Conditioning
from repagen.training.decoder import build_loss_networks
from repagen.training.decoder_kind import Inputs
from repagen.training.decoder_kl import KLKind, decode_latents, draw_latents
from repagen.training.decoder_step import DecoderStep
from repagen.training.end_to_end_config import EndToEndConfig
from repagen.training.frozen import FrozenParts
from repagen.training.generator_step import GeneratorStep
from repagen.training.noising import FlowMatching
from repagen.training.objective import GeneratorObjective
from repagen.training.run import Batch, Run


class LatentNorm(nn.Module):
    """The batch norm between autoencoder and generator: `BatchNorm2d(affine=False)` over a global batch.

    Attributes:
        running_mean, running_var: (C,), what the autoencoder's update and the released autoencoder standardise with.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, epsilon: float = 1e-4) -> None:
        super().__init__()
        self.momentum = momentum
        self.epsilon = epsilon
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @torch.no_grad()
    def start_from(self, autoencoder: Any) -> None:
        """Take over the shift and scale that an autoencoder's config gives its latents."""
        mean, std = kl_statistics(autoencoder, self.running_mean.view(1, -1, 1, 1))
        self.running_mean.copy_(mean.expand(1, len(self.running_mean), 1, 1).flatten())
        self.running_var.copy_(std.square().expand(1, len(self.running_var), 1, 1).flatten())

    def store_in(self, autoencoder: Any) -> None:
        """Make the running statistics those of an `AutoencoderKL`: mean, and the root of the variance."""
        autoencoder.register_to_config(
            latents_mean=self.running_mean.tolist(),
            latents_std=self.running_var.double().sqrt().tolist(),  # its square is the variance again, to the bit
            scaling_factor=1.0,
            shift_factor=None,
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Standardise raw latents (B, C, h, w) by the running statistics; float32."""
        return self._standardised(latents, self.running_mean, self.running_var)

    @torch.no_grad()
    def of_global_batch(self, parts: Sequence[Tensor], run: Run) -> list[Tensor]:
        """Standardise raw latents by their own statistics, and move the running ones.

        Args:
            parts: (B, C, h, w) of each micro-batch of this process.
            run: sums over the processes.
        """
        sums = torch.stack([channel_sums(part.flatten(2)) for part in parts]).sum(0)
        if run.plan.processes > 1:
            sums = run.accelerator.reduce(sums, "sum")
        count, total, squares = sums.unbind(1)
        mean = total / count
        squared_deviations = (squares - count * mean.square()).clamp(min=0.0)
        variance = squared_deviations / count
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        unbiased = squared_deviations / (count - 1)  # as BatchNorm keeps it
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return [self._standardised(part, mean.float(), variance.float()) for part in parts]

    def _standardised(self, latents: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        return (latents.float() - mean.view(shape)) * (variance.view(shape) + self.epsilon).rsqrt()


class EndToEndKind(KLKind):
    """An `AutoencoderKL` whose latents also answer for the generator's alignment.

    Args:
        config: of the whole run.
        run: the run.
        frozen: the alignment encoders, and the autoencoder, which is thawed.
        conditioning: what the generator is told.
        objective: the generator and its terms, not wrapped.
        norm: between the two.
    """

    def __init__(
        self,
        config: EndToEndConfig,
        run: Run,
        frozen: FrozenParts,
        conditioning: Conditioning,
        objective: GeneratorObjective,
        norm: LatentNorm,
    ) -> None:
        super().__init__(frozen.autoencoder.requires_grad_(True), config.of_autoencoder(), run)
        self.penalties = {
            "kl": config.autoencoder_training.kl_weight,
            "alignment": config.autoencoder_training.alignment_weight,
        }
        self._frozen = frozen
        self._conditioning = conditioning
        self._objective = objective
        self._norm = norm
        assert isinstance(objective.process, FlowMatching), "the program refuses others"
        self._process = replace(objective.process, dropout=replace(objective.process.dropout, probability=0.0))
        self._depth = max(target.block for target in config.alignment.targets)
        self._latents: dict[int, Tensor] = {}

    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        """Draw the posterior's noise, and encode the alignment targets."""
        self._latents.clear()
        terms: Any = self._objective.terms
        return [
            {
                **batch,
                "given": (given := self._frozen.alignment_inputs(batch, terms, ["alignment"])),
                "inputs": {
                    **batch["inputs"],
                    "conditions": self._conditioning.conditions(batch),
                    "positions": batch["position"],
                    "targets": given["targets"],
                },
            }
            for batch in super().prepare(batches)
        ]

    def reconstruct(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode, draw, decode; the penalties are the divergence and the generator's alignment loss."""
        latents, divergence = draw_latents(self.autoencoder, inputs["images"], inputs["noise"])
        self._latents[int(inputs["positions"][0])] = latents.detach()
        alignment = self._alignment(latents, inputs).expand(len(latents))
        return decode_latents(self.autoencoder, latents), {"kl": divergence, "alignment": alignment}

    def latents(self, batches: Sequence[Batch]) -> list[Tensor]:
        """The raw latents (B, C, h, w), detached, that the last update of the autoencoder drew for micro-batches."""
        return [self._latents[int(batch["position"][0])] for batch in batches]

    def _alignment(self, latents: Tensor, inputs: Inputs) -> Tensor:
        """The alignment loss, a scalar, of the generator's first blocks, with labels as they are."""
        generators = self.run.generators("flow", {"position": inputs["positions"]})
        sample = self._process.draw(self._norm(latents), inputs["conditions"], generators)
        with first_blocks(self._objective.model, self._depth):
            return self._objective(sample, {"targets": inputs["targets"]}, ["alignment"])["alignment"]


class EndToEndStep:
    """Both networks, their losses and optimisers, and what one optimiser step does with them.

    Args:
        run: the run.
        config: of the whole run.
        frozen: the alignment encoders, and the autoencoder, which is thawed.
        conditioning: what the generator is told.
        objective: the generator and its terms.
        dataset: names the samples of a broken step.

    Attributes:
        norm: between the two networks.
        perceptual: of the autoencoder's loss; None without.
        autoencoder_step, generator_step: the parts.
    """

    def __init__(
        self,
        run: Run,
        config: EndToEndConfig,
        frozen: FrozenParts,
        conditioning: Conditioning,
        objective: GeneratorObjective,
        dataset: SampleDataset,
    ) -> None:
        part = config.autoencoder_training
        self.run = run
        self.objective = objective
        self.norm = LatentNorm(frozen.latent_shape[0], part.norm_momentum, part.norm_epsilon).to(run.device)
        self.norm.start_from(frozen.autoencoder)
        self.kind = EndToEndKind(config, run, frozen, conditioning, objective, self.norm)
        self.perceptual, discriminator = build_loss_networks(part.lpips, part.adversarial)
        self.autoencoder_step = DecoderStep(
            run, config.of_autoencoder(), self.kind, dataset, self.perceptual, discriminator
        )
        self.generator_step = GeneratorStep(run, config, run.wrap(objective), objective.process, dataset)

    def parts(self) -> dict[str, Any]:
        """Name => what a checkpoint must hold, but for the generator's EMA; frozen networks are not part of it."""
        of_autoencoder = self.autoencoder_step.parts()
        return {
            "model": self.objective.model,
            "optimizer": self.generator_step.optimizer,
            "alignment": self.objective.terms,
            "latent_norm": self.norm,
            "autoencoder_optimizer": of_autoencoder.pop("optimizer"),
            **of_autoencoder,
        }

    def __call__(self, step: int, micro_batches: Iterator[Batch]) -> dict[str, float]:
        """Do optimiser step `step` = 0, 1, ... and return the row to log.

        Raises:
            UserError: a loss or gradient is not finite; before the optimiser step in question, naming the samples.
        """
        batches = self.kind.prepare(list(micro_batches))
        with constant(self.objective):
            of_autoencoder = self.autoencoder_step.update(step, batches)
        latents = self.norm.of_global_batch(self.kind.latents(batches), self.run)
        drawn = [(part, batch["inputs"]["conditions"]) for batch, part in zip(batches, latents, strict=True)]
        batches = [{**batch, "drawn": pair} for batch, pair in zip(batches, drawn, strict=True)]
        row = self.generator_step(
            step, iter(batches), lambda batch: batch["drawn"], lambda batch, active: batch["given"]
        )
        return {**row, **{f"autoencoder_{name}": value for name, value in of_autoencoder.items()}}


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """Within the context no parameter of a module takes part in gradients; those that did do again after it."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def first_blocks(model: Any, count: int) -> Iterator[None]:
    """Within the context a generator has only its first blocks; what comes after them is of no use then."""
    blocks = model.blocks
    model.blocks = blocks[:count]
    try:
        yield
    finally:
        model.blocks = blocks

"""One optimiser step of RAE's decoder training (arXiv 2510.11690, stage 1): losses, gates, adaptive weight.

    L_G = mean|x_hat - x| + w_lpips LPIPS(x_hat, x) + w_adv lambda L_adv          (images in [0, 1])
    lambda = clamp(|grad_W(L1 + w_lpips LPIPS)| / (|grad_W L_adv| + 1e-6), 0, 1e4), W the decoder's last projection

lambda is taken once per optimiser step, from gradients of the whole global batch, whatever its split over processes
and micro-batches. So that no gradient of the decoder is kept twice, each loss is first differentiated to the pixels
only: from there to W is one layer, and one backward pass through the decoder then carries the weighted sum. With
accumulation the decoder runs forward twice, since lambda needs every micro-batch before the first backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repagen.data import SampleDataset
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.randomness import generator_for, normal_per_sample, uniform_per_sample
from repagen.training.decoder_config import DecoderConfig
from repagen.training.discriminator import (
    DinoDiscriminator,
    adaptive_weight,
    augment,
    generator_loss,
    hinge_loss,
    quantised,
)
from repagen.training.optimizer import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from repagen.training.perceptual import PerceptualDistance
from repagen.training.run import Batch, Run


@dataclass(frozen=True)
class Gates:
    """First optimiser step (0-based) of each part of the loss; None = never."""

    lpips: int | None
    discriminator: int | None
    adversarial: int | None

    @classmethod
    def from_config(cls, config: DecoderConfig, dataset_length: int) -> Gates:
        """Convert epochs of the dataset to steps: a gate opens with the first step at or after its epoch."""

        def first_step(weight: float, epochs: float, steps: int | None) -> int | None:
            if weight == 0:
                return None
            return math.ceil(epochs * dataset_length / config.global_batch_size) if steps is None else steps

        lpips, gan = config.lpips, config.adversarial
        return cls(
            first_step(lpips.weight, lpips.start_epoch, lpips.start_step),
            first_step(gan.weight, gan.discriminator_start_epoch, gan.discriminator_start_step),
            first_step(gan.weight, gan.start_epoch, gan.start_step),
        )

    def notices(self, max_steps: int) -> Iterator[str]:
        """Say of each part when it begins, that it is off, or that the run ends before."""
        names = {
            "LPIPS (lpips)": self.lpips,
            "the discriminator (adversarial)": self.discriminator,
            "the adversarial loss (adversarial)": self.adversarial,
        }
        for name, gate in names.items():
            if gate is None:
                yield f"{name} is off (weight=0)"
            elif gate >= max_steps:
                yield f"{name} would begin at step {gate}, after the run's end at {max_steps}: it takes no part"
            else:
                yield f"{name} begins at step {gate} of {max_steps}"


def is_open(gate: int | None, step: int) -> bool:
    """True when a part of the loss takes part in step 0, 1, ..."""
    return gate is not None and step >= gate


@dataclass
class Draft:
    """A micro-batch's reconstruction and what the losses say about its pixels.

    Attributes:
        output: (B, 3, H, W), with its graph until it is used.
        values: name => unweighted loss of each sample (B,), detached; `reconstruction` is the weighted sum of the L1
            and LPIPS losses.
        pixel_gradient: gradient of the mean reconstruction loss to the output.
        adversarial_gradient: gradient of the mean adversarial loss to the output; None while its gate is closed.
        projection_gradients: both carried on to the last projection's weight, (2, out, in); None likewise.
    """

    output: Tensor
    values: dict[str, Tensor]
    pixel_gradient: Tensor
    adversarial_gradient: Tensor | None = None
    projection_gradients: Tensor | None = None


class _Decoding(nn.Module):
    """`decode` as a forward pass, which is what data parallelism can wrap."""

    def __init__(self, autoencoder: RepresentationAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents).sample.float()


class DecoderStep:
    """The decoder, its losses and optimisers, and what one optimiser step does with them.

    Args:
        run: the run.
        config: settings of losses and optimisers.
        autoencoder: its latents must be raw (no statistics), as stage 1 trains on them.
        dataset: names the samples of a broken step, and its length turns epochs into steps.
        perceptual, discriminator: networks of the losses; None where the weight is 0.
    """

    def __init__(
        self,
        run: Run,
        config: DecoderConfig,
        autoencoder: RepresentationAutoencoder,
        dataset: SampleDataset,
        perceptual: PerceptualDistance | None,
        discriminator: DinoDiscriminator | None,
    ) -> None:
        self.run = run
        self.config = config
        self.autoencoder = autoencoder
        self.dataset = dataset
        self.gates = Gates.from_config(config, len(dataset))
        self.decoding = run.wrap(_Decoding(autoencoder))
        self.optimizer = build_optimizer([autoencoder.decoder], config.optimizer)
        self.perceptual = None if perceptual is None else perceptual.to(run.device)
        self.discriminator = discriminator
        if discriminator is not None:
            self.discriminating = run.wrap(discriminator)
            self.discriminator_optimizer = build_optimizer([discriminator], config.adversarial.optimizer)

    def parts(self) -> dict[str, Any]:
        """Name => what a checkpoint must hold; frozen networks are not part of it."""
        parts: dict[str, Any] = {"decoder": self.autoencoder.decoder, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator.heads
            parts["discriminator_optimizer"] = self.discriminator_optimizer
        return parts

    def __call__(self, step: int, micro_batches: Iterator[Batch]) -> dict[str, float]:
        """Do optimiser step `step` = 0, 1, ... and return the row to log: the losses that took part, unweighted.

        Raises:
            UserError: a loss or gradient is not finite; before the optimiser step, naming the samples.
        """
        batches = [self._encode(batch) for batch in micro_batches]
        row = self._update_decoder(step, batches)
        if is_open(self.gates.discriminator, step):
            row["discriminator"] = self._update_discriminator(step, batches)
        return row

    def _encode(self, batch: Batch) -> Batch:
        """Add `latents` (B, C, h, w), raw, and `noisy`, z + tau u eps with u ~ U(0, 1) per sample."""
        with torch.no_grad(), self.run.autocast():
            latents = self.autoencoder.raw_latents(batch["image"])
        generators = self.run.generators("latent noise", batch)
        sigma = self.autoencoder.config["noise_tau"] * uniform_per_sample(generators)
        noise = normal_per_sample(generators, latents.shape[1:])
        return {**batch, "latents": latents, "noisy": latents + sigma.view(-1, 1, 1, 1) * noise}

    # --- decoder ---------------------------------------------------------------------------------------------------

    def _update_decoder(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """Accumulate the gradient of L_G over the micro-batches and take the optimiser step."""
        drafts: list[Draft] = []
        weight = 0.0
        if is_open(self.gates.adversarial, step):
            drafts = [self._draft(step, batch, keep_graph=len(batches) == 1) for batch in batches]
            weight = self._adaptive_weight(drafts)
        for index, batch in enumerate(self.run.accumulate(self.decoding, iter(batches))):
            if index == len(drafts):
                drafts.append(self._draft(step, batch, keep_graph=True))
            self._backward(batch, drafts[index], weight)
        return self._step_decoder(step, batches, drafts, weight)

    def _draft(self, step: int, batch: Batch, keep_graph: bool) -> Draft:
        """Reconstruct a micro-batch and differentiate its losses to the pixels.

        Without `keep_graph` the reconstruction is detached and `_backward` builds it a second time.
        """
        decoding = self.decoding if keep_graph else _Decoding(self.autoencoder)
        with self.run.autocast():
            output = decoding(batch["noisy"])
        pixels = output.detach().requires_grad_()
        values = self._reconstruction_losses(step, pixels, batch["image"])
        draft = Draft(output, values, _gradient(values["reconstruction"], pixels))
        if is_open(self.gates.adversarial, step):
            with self.run.autocast():
                logits = self._discriminator()(augment(pixels, self._augmentations("decoder", batch)))
            values["adversarial"] = generator_loss(logits)
            draft.adversarial_gradient = _gradient(values["adversarial"], pixels)
            draft.projection_gradients = self._to_projection(output, draft.pixel_gradient, draft.adversarial_gradient)
        draft.values = {name: value.detach() for name, value in values.items()}
        if not keep_graph:
            draft.output = output.detach()
        return draft

    def _reconstruction_losses(self, step: int, pixels: Tensor, images: Tensor) -> dict[str, Tensor]:
        values = {"l1": (pixels - images).abs().mean((1, 2, 3))}
        values["reconstruction"] = values["l1"]
        if self.perceptual is not None and is_open(self.gates.lpips, step):
            with self.run.autocast():
                values["lpips"] = self.perceptual(pixels, images)
            values["reconstruction"] = values["l1"] + self.config.lpips.weight * values["lpips"]
        return values

    def _to_projection(self, output: Tensor, *pixel_gradients: Tensor) -> Tensor:
        """Carry gradients from the pixels to the last projection's weight: one (out, in) each, stacked."""
        weight = self.autoencoder.decoder.decoder_pred.weight
        found = [torch.autograd.grad(output, weight, gradient, retain_graph=True)[0] for gradient in pixel_gradients]
        return torch.stack(found)

    def _adaptive_weight(self, drafts: list[Draft]) -> float:
        """Return lambda of the whole global batch."""
        gradients = [draft.projection_gradients for draft in drafts if draft.projection_gradients is not None]
        mean = torch.stack(gradients).mean(0)
        if self.run.plan.processes > 1:
            mean = self.run.accelerator.reduce(mean, "mean")
        return adaptive_weight(mean[0], mean[1]).item()

    def _backward(self, batch: Batch, draft: Draft, weight: float) -> None:
        """Carry the weighted sum of a draft's pixel gradients back through the decoder."""
        output = draft.output
        if not output.requires_grad:
            with self.run.autocast():
                output = self.decoding(batch["noisy"])
        gradient = draft.pixel_gradient
        if draft.adversarial_gradient is not None:
            gradient = gradient + self.config.adversarial.weight * weight * draft.adversarial_gradient
        self.run.backward((output * gradient).sum())
        draft.output = output.detach()

    def _step_decoder(self, step: int, batches: list[Batch], drafts: list[Draft], weight: float) -> dict[str, float]:
        for draft, batch in zip(drafts, batches, strict=True):
            draft.values["psnr"] = psnr(draft.output, batch["image"])
        means = self.run.mean([{name: value.mean() for name, value in draft.values.items()} for draft in drafts])
        row = {"loss": means.pop("reconstruction"), **means}
        if "adversarial" in means:
            row["loss"] += self.config.adversarial.weight * weight * means["adversarial"]
            row["adaptive_weight"] = weight
        rate = learning_rate(self.config.optimizer, step, self.config.max_steps)
        row["grad_norm"] = self._gradient_norm(self.autoencoder.decoder, self.config.optimizer)
        samples = [(batch, draft.values["reconstruction"]) for batch, draft in zip(batches, drafts, strict=True)]
        self.run.stop_if_not_finite(step, row, self.dataset, samples)
        self._take_step(self.optimizer, rate)
        return {**row, "learning_rate": rate}

    # --- discriminator ---------------------------------------------------------------------------------------------

    def _update_discriminator(self, step: int, batches: list[Batch]) -> float:
        """Take one step of the hinge loss on noise-free reconstructions of the updated decoder; returns the loss."""
        self._discriminator().update_spectral_norms()
        losses, samples = [], []
        for batch in self.run.accumulate(self.discriminating, iter(batches)):
            with torch.no_grad(), self.run.autocast():
                fakes = quantised(self.autoencoder.decode(batch["latents"]).sample.float())
            seen = [
                augment(batch["image"], self._augmentations("real", batch)),
                augment(fakes, self._augmentations("fake", batch)),
            ]
            with self.run.autocast():  # real and fake in one pass: data parallelism knows one forward per backward
                real_logits, fake_logits = self.discriminating(torch.cat(seen)).chunk(2)
            loss = hinge_loss(real_logits, fake_logits)
            self.run.backward(loss)
            losses.append({"discriminator": loss})
            samples.append((batch, fake_logits.mean(1)))
        settings = self.config.adversarial.optimizer
        norm = self._gradient_norm(self._discriminator(), settings)
        mean = self.run.mean(losses)["discriminator"]
        values = {"discriminator": mean, "discriminator grad_norm": norm}
        self.run.stop_if_not_finite(step, values, self.dataset, samples)
        rate = learning_rate(settings, step, self.config.max_steps)
        self._take_step(self.discriminator_optimizer, rate)
        return mean

    def _discriminator(self) -> DinoDiscriminator:
        assert self.discriminator is not None, "its gate is closed without one"
        return self.discriminator

    def _augmentations(self, purpose: str, batch: Batch) -> list[torch.Generator]:
        """One CPU generator per sample: the shifts are needed as numbers."""
        seed = self.config.seed
        return [generator_for(seed, f"augmentation {purpose}", position) for position in batch["position"].tolist()]

    # --- optimisers ------------------------------------------------------------------------------------------------

    @staticmethod
    def _gradient_norm(module: nn.Module, settings: OptimizerConfig) -> float:
        """Return the norm of all gradients of a module, after scaling them down if the settings ask for it."""
        parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or math.inf).item()

    @staticmethod
    def _take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W), clamped to [0, 1]; at most 100."""
    errors = (images.clamp(0.0, 1.0) - references).square().mean((1, 2, 3))
    return -10.0 * errors.clamp_min(1e-10).log10()


def _gradient(losses: Tensor, pixels: Tensor) -> Tensor:
    """Return the gradient of the mean of losses (B,) to the pixels."""
    return torch.autograd.grad(losses.mean(), pixels)[0]

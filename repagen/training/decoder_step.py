"""One optimiser step of an autoencoder's training: losses, gates, adaptive weight.

    L_G = w_1 mean|x_hat - x| + w_lpips LPIPS(x_hat, x) + w_adv lambda L_adv + penalties      (images in [0, 1])
    lambda = clamp(|grad_W(w_1 L1 + w_lpips LPIPS)| / (|grad_W L_adv| + eps), 0, max), W the decoder's last weight

RAE (arXiv 2510.11690, stage 1), SVG (2510.15301) and AutoencoderKL (LDM, 2112.10752) differ in what makes x_hat and in
the penalties; that is an `AutoencoderKind`.

lambda is taken once per optimiser step, from gradients of the whole global batch, whatever its split over processes
and micro-batches. So that no gradient of the autoencoder is kept twice, each loss is first differentiated to the
pixels only: from there to W is one layer, and one backward pass then carries the weighted sum. With accumulation the
autoencoder runs forward twice, since lambda needs every micro-batch before the first backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repagen.data import SampleDataset
from repagen.evaluation.metrics.perceptual import PerceptualDistance
from repagen.evaluation.reconstruction.pixel_metrics import peak_signal_to_noise_ratio
from repagen.randomness import generator_for
from repagen.training.decoder_config import DecoderConfig
from repagen.training.decoder_kind import AutoencoderKind, Inputs
from repagen.training.discriminator import Discriminator, adaptive_weight, generator_loss, hinge_loss
from repagen.training.optimizer import Optimizer, OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
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
        penalty: the weighted sum of the penalties of each sample (B,), with its graph until it is used; None without.
        values: name => unweighted loss of each sample (B,), detached; `reconstruction` is the weighted sum of the L1
            and LPIPS losses, `whole` that and the penalties.
        pixel_gradient: gradient of the mean reconstruction loss to the output.
        adversarial_gradient: gradient of the mean adversarial loss to the output; None while its gate is closed.
        last_gradients: both carried on to the decoder's last weight, (2, *its shape); None without adaptive weight.
    """

    output: Tensor
    penalty: Tensor | None
    values: dict[str, Tensor]
    pixel_gradient: Tensor
    adversarial_gradient: Tensor | None = None
    last_gradients: Tensor | None = None


class _Reconstruction(nn.Module):
    """`reconstruct` as a forward pass, which is what data parallelism can wrap."""

    def __init__(self, kind: AutoencoderKind) -> None:
        super().__init__()
        self.autoencoder = kind.autoencoder
        self._kind = kind

    def forward(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        return self._kind.reconstruct(inputs)


class DecoderStep:
    """The autoencoder, its losses and optimisers, and what one optimiser step does with them.

    Args:
        run: the run.
        config: settings of losses and optimisers.
        kind: the autoencoder.
        dataset: names the samples of a broken step, and its length turns epochs into steps.
        perceptual, discriminator: networks of the losses; None where the weight is 0.
    """

    def __init__(
        self,
        run: Run,
        config: DecoderConfig,
        kind: AutoencoderKind,
        dataset: SampleDataset,
        perceptual: PerceptualDistance | None,
        discriminator: Discriminator | None,
    ) -> None:
        self.run = run
        self.config = config
        self.kind = kind
        self.dataset = dataset
        self.gates = Gates.from_config(config, len(dataset))
        self.reconstructing = run.wrap(_Reconstruction(kind))
        self.optimizer = build_optimizer([kind.trained], config.optimizer)
        self.perceptual = None if perceptual is None else perceptual.to(run.device)
        self.discriminator = discriminator
        if discriminator is not None:
            self.discriminating = run.wrap(discriminator)
            self.discriminator_optimizer = build_optimizer([discriminator], config.adversarial.optimizer)

    def parts(self) -> dict[str, Any]:
        """Name => what a checkpoint must hold; frozen networks are not part of it."""
        parts: dict[str, Any] = {self.kind.part: self.kind.trained, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator.trained
            parts["discriminator_optimizer"] = self.discriminator_optimizer
        return parts

    def __call__(self, step: int, micro_batches: Iterator[Batch]) -> dict[str, float]:
        """Do optimiser step `step` = 0, 1, ... and return the row to log: the losses that took part, unweighted.

        Raises:
            UserError: a loss or gradient is not finite; before the optimiser step, naming the samples.
        """
        return self.update(step, self.kind.prepare(list(micro_batches)))

    def update(self, step: int, batches: list[Batch]) -> dict[str, float]:
        """Do the step with micro-batches that the kind has prepared; see `__call__`."""
        row, fakes = self._update_autoencoder(step, batches)
        if is_open(self.gates.discriminator, step):
            row["discriminator"] = self._update_discriminator(step, batches, fakes)
        return row

    def rehearse(self, batch: Batch) -> None:
        """Go forward and back with a micro-batch and all losses that ever take part, and drop the gradients."""
        [prepared] = self.kind.prepare([batch])
        with self.run.accelerator.no_sync(self.reconstructing):
            try:
                draft = self._draft(self.config.max_steps - 1, prepared, keep_graph=True)
                self._backward(prepared, draft, 1.0)
            finally:
                self.optimizer.zero_grad(set_to_none=True)

    # --- autoencoder -----------------------------------------------------------------------------------------------

    def _update_autoencoder(self, step: int, batches: list[Batch]) -> tuple[dict[str, float], list[Tensor]]:
        """Accumulate the gradient of L_G, take the optimiser step; returns the row and the reconstructions."""
        drafts: list[Draft] = []
        weight = 1.0
        if is_open(self.gates.adversarial, step) and self.config.adversarial.adaptive:
            drafts = [self._draft(step, batch, keep_graph=len(batches) == 1) for batch in batches]
            weight = self._adaptive_weight(drafts)
        for index, batch in enumerate(self.run.accumulate(self.reconstructing, iter(batches))):
            if index == len(drafts):
                drafts.append(self._draft(step, batch, keep_graph=True))
            self._backward(batch, drafts[index], weight)
        return self._step_autoencoder(step, batches, drafts, weight), [draft.output for draft in drafts]

    def _draft(self, step: int, batch: Batch, keep_graph: bool) -> Draft:
        """Reconstruct a micro-batch and differentiate its losses to the pixels.

        Without `keep_graph` the reconstruction is detached and `_backward` builds it a second time.
        """
        reconstructing = self.reconstructing if keep_graph else _Reconstruction(self.kind)
        with self.run.autocast():
            output, penalties = reconstructing(batch["inputs"])
        pixels = output.detach().requires_grad_()
        values = {**self._reconstruction_losses(step, pixels, batch["image"]), **penalties}
        draft = Draft(output, self._weighted(penalties), values, _gradient(values["reconstruction"], pixels))
        if is_open(self.gates.adversarial, step):
            discriminator = self._discriminator()
            with self.run.autocast():
                logits = discriminator(discriminator.view(pixels, self._augmentations("decoder", batch)))
            values["adversarial"] = generator_loss(logits)
            draft.adversarial_gradient = _gradient(values["adversarial"], pixels)
            if self.config.adversarial.adaptive:
                draft.last_gradients = self._to_last_weight(output, draft.pixel_gradient, draft.adversarial_gradient)
        values["whole"] = values["reconstruction"] + (0.0 if draft.penalty is None else draft.penalty)
        draft.values = {name: value.detach() for name, value in values.items()}
        if not keep_graph:
            draft.output, draft.penalty = output.detach(), None
        return draft

    def _weighted(self, penalties: dict[str, Tensor]) -> Tensor | None:
        """Return the weighted sum of the penalties (B,); None where there are none."""
        weighted = [self.kind.penalties[name] * value for name, value in penalties.items()]
        return torch.stack(weighted).sum(0) if weighted else None

    def _reconstruction_losses(self, step: int, pixels: Tensor, images: Tensor) -> dict[str, Tensor]:
        values = {"l1": (pixels - images).abs().mean((1, 2, 3))}
        values["reconstruction"] = self.config.l1_weight * values["l1"]
        if self.perceptual is not None and is_open(self.gates.lpips, step):
            with self.run.autocast():
                values["lpips"] = self.perceptual(pixels, images)
            values["reconstruction"] = values["reconstruction"] + self.config.lpips.weight * values["lpips"]
        return values

    def _to_last_weight(self, output: Tensor, *pixel_gradients: Tensor) -> Tensor:
        """Carry gradients from the pixels to the decoder's last weight: one of its shape each, stacked."""
        weight = self.kind.last_weight
        found = [torch.autograd.grad(output, weight, gradient, retain_graph=True)[0] for gradient in pixel_gradients]
        return torch.stack(found)

    def _adaptive_weight(self, drafts: list[Draft]) -> float:
        """Return lambda of the whole global batch."""
        gradients = [draft.last_gradients for draft in drafts if draft.last_gradients is not None]
        mean = torch.stack(gradients).mean(0)
        if self.run.plan.processes > 1:
            mean = self.run.accelerator.reduce(mean, "mean")
        settings = self.config.adversarial
        return adaptive_weight(mean[0], mean[1], settings.adaptive_epsilon, settings.adaptive_maximum).item()

    def _backward(self, batch: Batch, draft: Draft, weight: float) -> None:
        """Carry the weighted sum of a draft's pixel gradients, and the penalties, back through the autoencoder."""
        output, penalty = draft.output, draft.penalty
        if not output.requires_grad:
            with self.run.autocast():
                output, penalties = self.reconstructing(batch["inputs"])
            penalty = self._weighted(penalties)
        gradient = draft.pixel_gradient
        if draft.adversarial_gradient is not None:
            gradient = gradient + self.config.adversarial.weight * weight * draft.adversarial_gradient
        loss = (output * gradient).sum()
        self.run.backward(loss if penalty is None else loss + penalty.mean())
        draft.output, draft.penalty = output.detach(), None

    def _step_autoencoder(
        self, step: int, batches: list[Batch], drafts: list[Draft], weight: float
    ) -> dict[str, float]:
        for draft, batch in zip(drafts, batches, strict=True):
            draft.values["psnr"] = peak_signal_to_noise_ratio(draft.output.clamp(0, 1), batch["image"])
        means = self.run.mean([{name: value.mean() for name, value in draft.values.items()} for draft in drafts])
        del means["reconstruction"]
        row = {"loss": means.pop("whole"), **means}
        if "adversarial" in means:
            row["loss"] += self.config.adversarial.weight * weight * means["adversarial"]
            row |= {"adaptive_weight": weight} if self.config.adversarial.adaptive else {}
        rate = learning_rate(self.config.optimizer, step, self.config.max_steps)
        row["grad_norm"] = self._gradient_norm(self.kind.trained, self.config.optimizer)
        samples = [(batch, draft.values["whole"]) for batch, draft in zip(batches, drafts, strict=True)]
        self.run.stop_if_not_finite(step, row, self.dataset, samples)
        self._take_step(self.optimizer, rate)
        return {**row, "learning_rate": rate}

    # --- discriminator ---------------------------------------------------------------------------------------------

    def _update_discriminator(self, step: int, batches: list[Batch], reconstructions: list[Tensor]) -> float:
        """Take one step of the hinge loss on images and the kind's fakes; returns the loss."""
        discriminator = self._discriminator()
        discriminator.begin_update()
        losses, samples = [], []
        for batch, reconstruction in zip(
            self.run.accumulate(self.discriminating, iter(batches)), reconstructions, strict=True
        ):
            with torch.no_grad(), self.run.autocast():
                fakes = discriminator.as_fakes(self.kind.fakes(batch, reconstruction))
            seen = [
                discriminator.view(batch["image"], self._augmentations("real", batch)),
                discriminator.view(fakes, self._augmentations("fake", batch)),
            ]
            with self.run.autocast():  # real and fake in one pass: data parallelism knows one forward per backward
                real_logits, fake_logits = self.discriminating(torch.cat(seen)).chunk(2)
            loss = hinge_loss(real_logits, fake_logits)
            self.run.backward(loss)
            losses.append({"discriminator": loss})
            samples.append((batch, fake_logits.mean(1)))
        settings = self.config.adversarial.optimizer
        norm = self._gradient_norm(discriminator, settings)
        mean = self.run.mean(losses)["discriminator"]
        values = {"discriminator": mean, "discriminator grad_norm": norm}
        self.run.stop_if_not_finite(step, values, self.dataset, samples)
        rate = learning_rate(settings, step, self.config.max_steps)
        self._take_step(self.discriminator_optimizer, rate)
        return mean

    def _discriminator(self) -> Discriminator:
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
    def _take_step(optimizer: Optimizer, rate: float) -> None:
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _gradient(losses: Tensor, pixels: Tensor) -> Tensor:
    """Return the gradient of the mean of losses (B,) to the pixels."""
    return torch.autograd.grad(losses.mean(), pixels)[0]

"""The diffusion that DiT is trained on: 1,000 discrete steps, epsilon prediction, learned variance.

Sources: DDPM (2006.11239), Improved DDPM (2102.09672), DiT (2212.09748). The betas are those of diffusers' schedulers,
so that what is trained here is what `DDPMScheduler` and `DDIMScheduler` sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.randomness import normal_per_sample, uniform_per_sample
from repagen.training.noising import NoisySample

NUM_STEPS = 1000
_HALF_BIN = 1 / 255  # half the distance of two grey levels of an image in [-1, 1]
_SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class DDPMSample(NoisySample):
    """A sample on the discrete path x_n = sqrt(a_n) x + sqrt(1 - a_n) noise, a_n the product of 1 - beta up to n.

    Attributes:
        steps: n (B,) int64 in [0, 1000); t is n / 1000.
    """

    steps: torch.Tensor

    @property
    def timestep(self) -> torch.Tensor:
        """The steps: DiT counts them itself."""
        return self.steps


@dataclass(frozen=True)
class DDPM:
    """Discrete diffusion with linear betas.

    Attributes:
        dropout: of conditions.
    """

    dropout: ConditionDropout

    @cached_property
    def betas(self) -> torch.Tensor:
        """Variances of the steps (1000,) float64, from 1e-4 to 0.02."""
        scheduler = DDPMScheduler(num_train_timesteps=NUM_STEPS, beta_start=1e-4, beta_end=0.02)
        return scheduler.betas.double()

    @cached_property
    def kept(self) -> torch.Tensor:
        """Share of the data's variance that is left after each step, a_n, (1000,) float64."""
        return (1 - self.betas).cumprod(0)

    def draw(self, latents: torch.Tensor, conditions: Conditions, generators: Sequence[torch.Generator]) -> DDPMSample:
        """Draw step, dropout of conditions and noise of each sample, in this order, from the sample's own generator.

        Args:
            latents: x (B, C, h, w).
            conditions: of the samples.
            generators: one per sample, on the latents' device.
        """
        steps = (uniform_per_sample(generators) * NUM_STEPS).long()
        kept = self.dropout(conditions, generators)
        noise = normal_per_sample(generators, latents.shape[1:])
        share = _at(self.kept, steps, latents)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        return DDPMSample(latents, noisy, noise, steps.float() / NUM_STEPS, kept, steps)

    def losses(self, output: Any, sample: DDPMSample, prediction_type: str) -> dict[str, torch.Tensor]:
        """Losses of every sample by name, each (B,) float32.

        - `epsilon`: squared error of the predicted noise, mean over elements (DDPM, equation 14).
        - `variational_bound`: of the learned variance, where the output has 2C channels; see `variational_bound`.
        """
        prediction = output.sample.float()
        channels = sample.latents.shape[1]
        epsilon = prediction[:, :channels]
        losses = {"epsilon": (epsilon - sample.noise).square().flatten(1).mean(1)}
        if prediction.shape[1] == 2 * channels:
            losses["variational_bound"] = self.variational_bound(epsilon, prediction[:, channels:], sample)
        return losses

    def variational_bound(
        self, epsilon: torch.Tensor, interpolation: torch.Tensor, sample: DDPMSample
    ) -> torch.Tensor:
        """Term of the variational bound that belongs to each sample's step, in bits per dimension, (B,).

        The variance lies between the posterior's and beta, log-linearly (Improved DDPM, equation 15). The mean is
        taken without gradient, so that this trains the variance alone (section 3.1 there). Step 0 is the likelihood
        of the data in bins of 8 bits over [-1, 1] (DDPM, equation 13), latents or not, as in DiT's code.

        Args:
            epsilon: predicted noise (B, C, h, w).
            interpolation: (B, C, h, w), -1 = the posterior's variance, 1 = beta.
            sample: what was predicted.
        """
        share = _at(self.kept, sample.steps, epsilon)
        predicted = (sample.noisy - (1 - share).sqrt() * epsilon.detach()) / share.sqrt()
        target_mean, low = self.posterior(sample.latents, sample)
        mean, _ = self.posterior(predicted, sample)
        high = _at(self.betas, sample.steps, epsilon).log()
        log_variance = low + (interpolation + 1) / 2 * (high - low)
        divergence = _gaussian_divergence(target_mean, low, mean, log_variance)
        likelihood = _binned_log_likelihood(sample.latents, mean, log_variance)
        first = (sample.steps == 0).reshape(-1, 1, 1, 1)
        return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)

    def posterior(self, x: torch.Tensor, sample: DDPMSample) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, C, h, w) and log variance (B, 1, 1, 1) of q(x_{n-1} | x_n, x) (DDPM, equations 6 and 7).

        Step 0 has no variance; it takes that of step 1, as in Improved DDPM.
        """
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.kept[:-1]])
        of_x = self.betas * before.sqrt() / (1 - self.kept)
        of_noisy = (1 - before) * (1 - self.betas).sqrt() / (1 - self.kept)
        variance = self.betas * (1 - before) / (1 - self.kept)
        variance[0] = variance[1]
        mean = _at(of_x, sample.steps, x) * x + _at(of_noisy, sample.steps, x) * sample.noisy
        return mean, _at(variance, sample.steps, x).log()


def _at(table: torch.Tensor, steps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Entries of a table (1000,) at the steps (B,), as float32 (B, 1, 1, 1) on the device of `like`."""
    return table.to(like.device)[steps].float().reshape(-1, 1, 1, 1)


def _gaussian_divergence(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)) of every element, in nats."""
    ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (ratio.exp() - 1 - ratio + distance)


def _binned_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log probability under N(mean, variance) of the bin of width 2/255 around x, open at both ends of [-1, 1]."""
    precision = torch.exp(-0.5 * log_variance)
    below_upper_edge = torch.special.ndtr((x - mean + _HALF_BIN) * precision)
    below_lower_edge = torch.special.ndtr((x - mean - _HALF_BIN) * precision)
    probability = torch.where(
        x < -0.999,
        below_upper_edge,
        torch.where(x > 0.999, 1 - below_lower_edge, below_upper_edge - below_lower_edge),
    )
    return probability.clamp(min=_SMALLEST_PROBABILITY).log()

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.randomness import generator_for
from repagen.training.discrete_diffusion import DDPM, DDPMSample

SHAPE = (2, 3, 3)
PROCESS = DDPM(ConditionDropout.of_classes(10, 0.5))


def draw(positions: range) -> DDPMSample:
    latents = torch.stack([torch.full(SHAPE, position / 10) for position in positions])
    generators = [generator_for(0, "flow", position) for position in positions]
    return PROCESS.draw(latents, Conditions(torch.arange(len(positions)) % 10), generators)


def at_steps(steps: list[int]) -> DDPMSample:
    """A sample at given steps, noised by diffusers' scheduler."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(len(steps), *SHAPE, generator=generator) for _ in range(2))
    numbers = torch.tensor(steps)
    noisy = scheduler().add_noise(latents, noise, numbers)
    return DDPMSample(latents, noisy, noise, numbers / 1000, Conditions(), numbers)


def scheduler() -> Any:
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=False,
    )


def losses(prediction: torch.Tensor, sample: DDPMSample) -> dict[str, torch.Tensor]:
    return PROCESS.losses(SimpleNamespace(sample=prediction), sample, "epsilon")


def test_draws_belong_to_the_position_not_to_the_batch() -> None:
    whole, part = draw(range(8)), draw(range(5, 8))
    assert torch.equal(whole.steps[5:], part.steps)
    assert torch.equal(whole.noisy[5:], part.noisy)
    assert whole.conditions.labels is not None and part.conditions.labels is not None


def test_steps_are_whole_numbers_in_range_and_uniform() -> None:
    sample = draw(range(4000))
    assert sample.steps.dtype == torch.int64
    assert sample.steps.min() >= 0 and sample.steps.max() <= 999
    assert abs(sample.steps.float().mean().item() - 499.5) < 4 * 1000 / math.sqrt(12 * 4000)
    assert torch.equal(sample.t, sample.steps / 1000)
    assert torch.equal(sample.timestep, sample.steps)


def test_noisy_latents_are_those_of_diffusers_scheduler() -> None:
    sample = draw(range(6))
    expected = scheduler().add_noise(sample.latents, sample.noise, sample.steps)
    assert torch.allclose(sample.noisy, expected, atol=1e-5)


def test_exact_noise_and_posterior_variance_lose_nothing_but_the_first_step() -> None:
    sample = at_steps([1, 17, 500, 999])
    found = losses(torch.cat([sample.noise, torch.full_like(sample.noise, -1.0)], dim=1), sample)
    assert found["epsilon"].abs().max() == 0
    assert found["variational_bound"].abs().max() < 1e-5


def test_a_network_without_variance_has_no_bound() -> None:
    sample = at_steps([3])
    assert losses(sample.noise, sample).keys() == {"epsilon"}


def restated_bound(prediction: torch.Tensor, sample: DDPMSample) -> torch.Tensor:
    """Improved DDPM's L_vlb term by term, in float64, from Bayes' rule on the two Gaussians of a step."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bits = []
    for x, x_n, out, n in zip(sample.latents, sample.noisy, prediction, sample.steps.tolist(), strict=True):
        x, x_n, (eps, v) = x.double(), x_n.double(), out.double().chunk(2)
        left = torch.prod(1 - betas[: n + 1])
        left_before = torch.prod(1 - betas[:n]) if n else torch.tensor(1.0, dtype=torch.float64)

        def posterior(clean: torch.Tensor, n: int = n, before: Any = left_before, x_n: Any = x_n) -> Any:
            # N(x_n; sqrt(1 - beta) y, beta) times N(y; sqrt(before) clean, 1 - before), as a Gaussian in y.
            precision = (1 - betas[n]) / betas[n] + 1 / (1 - before)
            mean = ((1 - betas[n]).sqrt() * x_n / betas[n] + before.sqrt() * clean / (1 - before)) / precision
            return mean, 1 / precision

        guess = (x_n - (1 - left).sqrt() * eps) / left.sqrt()
        low = posterior(x)[1] if n else 1 / ((1 - betas[1]) / betas[1] + 1 / betas[0])
        variance = torch.exp((v + 1) / 2 * betas[n].log() + (1 - v) / 2 * low.log())
        if n:
            nats = kl_divergence(Normal(posterior(x)[0], low.sqrt()), Normal(posterior(guess)[0], variance.sqrt()))
        else:  # the posterior of the first step is the data itself
            model = Normal(guess, variance.sqrt())
            upper = torch.where(x > 0.999, 1.0, model.cdf(x + 1 / 255))
            lower = torch.where(x < -0.999, 0.0, model.cdf(x - 1 / 255))
            nats = -(upper - lower).clamp(min=1e-12).log()
        bits.append(nats.mean() / math.log(2))
    return torch.stack(bits)


def test_the_bound_is_improved_ddpms() -> None:
    sample = at_steps([0, 0, 1, 2, 50, 500, 998, 999])
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(sample.noise.shape, generator=generator)
    v = torch.rand(sample.noise.shape, generator=generator) * 2.4 - 1.2
    prediction = torch.cat([sample.noise + 0.3 * error, v], dim=1)
    found = losses(prediction, sample)
    assert torch.allclose(found["epsilon"], (0.3 * error).square().flatten(1).mean(1), atol=1e-5)
    expected = restated_bound(prediction, sample).float()
    assert torch.allclose(found["variational_bound"], expected, rtol=2e-3, atol=1e-5)


def test_the_sampler_and_the_bound_mean_the_same_variance() -> None:
    sample = at_steps([300])
    _, low = PROCESS.posterior(sample.latents, sample)
    for value in (-1.0, 0.0, 0.7, 1.0):
        learned = torch.tensor(value)
        high = PROCESS.betas[300].log().float()
        expected = scheduler()._get_variance(300, predicted_variance=learned)  # log variance under learned_range
        assert (low + (learned + 1) / 2 * (high - low)).item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_bound_trains_the_variance_alone() -> None:
    sample = at_steps([10, 600])
    prediction = torch.cat([sample.noise + 0.1, torch.zeros_like(sample.noise)], dim=1).requires_grad_()
    losses(prediction, sample)["variational_bound"].sum().backward()
    gradient = prediction.grad
    assert gradient is not None
    assert gradient[:, : SHAPE[0]].abs().max() == 0 and gradient[:, SHAPE[0] :].abs().min() > 0

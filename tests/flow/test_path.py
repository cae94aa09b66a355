from __future__ import annotations

import pytest
import torch

from repagen.errors import UserError
from repagen.flow.path import (
    interpolate,
    score_from_velocity,
    to_epsilon,
    to_sample,
    to_velocity,
    velocity_target,
)


@pytest.fixture
def triple() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 4, generator=generator)
    noise = torch.randn(5, 3, 4, 4, generator=generator)
    return x, noise, torch.tensor([0.06, 0.2, 0.5, 0.8, 0.94])


def test_path_runs_from_data_to_noise(triple):
    x, noise, _ = triple
    assert torch.equal(interpolate(x, noise, 0.0), x)
    assert torch.equal(interpolate(x, noise, 1.0), noise)


def test_velocity_is_the_slope_of_the_path(triple):
    x, noise, t = triple
    slope = (interpolate(x, noise, t + 0.02) - interpolate(x, noise, t - 0.02)) / 0.04
    torch.testing.assert_close(slope, velocity_target(x, noise), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["velocity", "sample", "epsilon"])
def test_true_prediction_recovers_velocity_sample_and_noise(triple, prediction_type):
    x, noise, t = triple
    x_t = interpolate(x, noise, t)
    prediction = {"velocity": noise - x, "sample": x, "epsilon": noise}[prediction_type]
    close = {"rtol": 0, "atol": 5e-5}
    torch.testing.assert_close(to_velocity(prediction, x_t, t, prediction_type), noise - x, **close)
    torch.testing.assert_close(to_sample(prediction, x_t, t, prediction_type), x, **close)
    torch.testing.assert_close(to_epsilon(prediction, x_t, t, prediction_type), noise, **close)


def test_sample_prediction_is_divided_by_the_clamped_time():
    x_t, x_hat = torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)
    velocity = to_velocity(x_hat, x_t, torch.tensor([0.01, 0.5]), "sample", minimum_time=0.05)
    torch.testing.assert_close(velocity, torch.tensor([[40.0], [4.0]]))


def test_score_of_a_gaussian_is_minus_x_over_its_variance():
    # Data N(0, s^2): the marginal at t is N(0, var), and its velocity field is linear in x.
    s, t, x_t = 0.5, 0.3, torch.linspace(-2, 2, 7).reshape(7, 1)
    variance = (1 - t) ** 2 * s**2 + t**2
    velocity = x_t * (t - (1 - t) * s**2) / variance
    torch.testing.assert_close(score_from_velocity(velocity, x_t, t), -x_t / variance)


def test_gradients_reach_prediction_and_time(triple):
    x, noise, t = triple
    t = t.clone().requires_grad_()
    prediction = torch.zeros_like(x, requires_grad=True)
    to_velocity(prediction, interpolate(x, noise, t), t, "sample").square().sum().backward()
    assert t.grad is not None and t.grad.abs().min() > 0
    assert prediction.grad is not None and prediction.grad.abs().sum() > 0


def test_one_time_per_sample_equals_sample_by_sample(triple):
    x, noise, t = triple
    together = interpolate(x, noise, t)
    alone = [interpolate(x[i : i + 1], noise[i : i + 1], float(t[i])) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_bad_time_and_prediction_type_are_named(triple):
    x, noise, t = triple
    with pytest.raises(UserError, match=r"t has shape \(4,\).*5 samples"):
        interpolate(x, noise, t[:4])
    with pytest.raises(UserError, match="'x0'; allowed: velocity, sample, epsilon"):
        to_velocity(x, noise, t, "x0")


def test_epsilon_prediction_is_finite_at_pure_noise():
    x_t, epsilon = torch.full((2, 1), 3.0), torch.full((2, 1), 1.0)
    velocity = to_velocity(epsilon, x_t, torch.tensor([1.0, 0.5]), "epsilon", minimum_time=0.05)
    torch.testing.assert_close(velocity, torch.tensor([[-40.0], [-4.0]]))

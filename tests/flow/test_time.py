from __future__ import annotations

import math

import pytest
import torch

from repagen.errors import UserError
from repagen.flow.time import TimeDistribution, TimeShift

RAE_SHIFT = math.sqrt(768 * 16 * 16 / 4096)


@pytest.mark.parametrize("alpha", [0.15, 1.0, RAE_SHIFT, 13.856])
def test_shift_is_a_translation_of_the_logit(alpha):
    t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    torch.testing.assert_close(torch.logit(TimeShift(alpha)(t)), torch.logit(t) + math.log(alpha))


@pytest.mark.parametrize("alpha", [0.15, 1.0, RAE_SHIFT])
def test_shift_keeps_the_ends_and_inverts(alpha):
    shift = TimeShift(alpha)
    t = torch.linspace(0, 1, 101)
    assert float(shift(t[0])) == 0.0 and float(shift(t[-1])) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(shift.inverse(shift(t)), t, rtol=0, atol=2e-6)
    torch.testing.assert_close(1 - TimeShift(1 / alpha)(1 - t), shift(t), rtol=0, atol=1e-6)


def test_shifts_compose_by_multiplication():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(TimeShift(2.0)(TimeShift(3.0)(t)), TimeShift(6.0)(t))


@pytest.mark.parametrize(
    ("shape", "alpha"),
    [((768, 16, 16), 6.928), ((1024, 16, 16), 8.0), ((384, 16, 16), 4.899), ((768, 32, 32), 13.856)],
)
def test_shift_of_published_latents(shape, alpha):
    assert TimeShift.for_latent_shape(shape).alpha == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
@pytest.mark.parametrize("maximum", [0.7, 0.999, 1.0])
def test_times_rise_with_u_within_their_range(kind, maximum):
    shift = TimeShift(3.0)
    law = TimeDistribution(kind, mean=0.3, std=1.2, maximum=maximum, shift=shift)
    u = torch.linspace(0, 1 - 2**-24, 1001)
    t = law.from_uniform(u)
    assert t.dtype == torch.float32
    assert float(t[0]) == 0.0
    assert bool((t.diff() >= 0).all())
    assert float(t[-1]) <= shift(maximum) + 1e-6
    assert float(t[-1]) == pytest.approx(shift(maximum), abs=2e-3)


def test_logit_normal_has_its_distribution_function():
    law = TimeDistribution("logit_normal", mean=-0.4, std=0.8, maximum=0.9)
    u = torch.linspace(0.001, 0.999, 333)
    t = law.from_uniform(u).double()
    normal = torch.distributions.Normal(-0.4, 0.8)
    truncated_cdf = normal.cdf(torch.logit(t)) / normal.cdf(torch.logit(torch.tensor(0.9)))
    torch.testing.assert_close(truncated_cdf, u.double(), rtol=0, atol=1e-5)


def test_shifted_logit_normal_is_the_logit_normal_of_a_shifted_mean():
    u = torch.linspace(0.01, 0.99, 99)
    shifted = TimeDistribution("logit_normal", shift=TimeShift(RAE_SHIFT)).from_uniform(u)
    moved_mean = TimeDistribution("logit_normal", mean=math.log(RAE_SHIFT)).from_uniform(u)
    torch.testing.assert_close(shifted, moved_mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cosine"}, "kind is 'cosine'; allowed: uniform, logit_normal"),
        ({"std": 0.0}, "std is 0.0"),
        ({"maximum": 1.5}, "maximum is 1.5"),
    ],
)
def test_bad_laws_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        TimeDistribution(**arguments)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_shift_is_refused(alpha):
    with pytest.raises(UserError, match="alpha is"):
        TimeShift(alpha)

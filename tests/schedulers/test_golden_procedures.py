"""The samplers equal the official ones on a closed-form velocity field (tests/golden/procedures)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from repagen import sampler_preset
from repagen.flow.guidance import GuidanceInterval, guide

NULL_LABEL = 1000.0
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def expected(golden) -> dict[str, torch.Tensor]:
    return load_file(golden / "procedures" / "expected.safetensors")


def velocity_field(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The field of case.json."""
    offset = 0.1 * (labels.reshape(-1, 1, 1, 1) + 1) / 11
    return 0.7 * x * torch.cos(2 * t) - 0.3 * torch.sin(3 * x + t) + offset


def drive(scheduler, sigmas, expected, guidance=None, noise=()) -> tuple[torch.Tensor, list[float]]:
    """Loop as any diffusers user would; return the end point and the times of the model calls."""
    x, labels = expected["latents"], expected["labels"].float()
    scheduler.set_timesteps(sigmas=sigmas)
    times = []
    for index, timestep in enumerate(scheduler.timesteps):
        t = timestep / 1000
        times.append(t.item())
        velocity = velocity_field(x, t, labels)
        if guidance is not None and guidance[1].contains(t):
            velocity = guide(velocity_field(x, t, torch.full_like(labels, NULL_LABEL)), velocity, guidance[0])
        draws = {"variance_noise": noise[index]} if index < len(noise) else {}
        x = scheduler.step(velocity, timestep, x, **draws).prev_sample
    return x, times


REPA_GUIDANCE = (1.8, GuidanceInterval(0.0, 0.7))


@pytest.mark.parametrize(
    ("case", "preset", "arguments", "guidance", "calls"),
    [
        ("repa_ode", "repa-ode", {}, None, 50),
        ("repa_ode_heun", "repa-heun", {}, None, 99),
        ("repa_ode_cfg_interval", "repa-ode", {}, REPA_GUIDANCE, 50),
        ("repa_sde", "repa-sde", {"num_inference_steps": 50}, None, 50),
        ("repa_sde_cfg", "repa-sde", {"num_inference_steps": 50}, REPA_GUIDANCE, 50),
        ("rae_ode_shift6.928", "rae-euler", {}, None, 49),
        ("rae_ode_shift1.000", "rae-euler", {"shift": 1.0}, None, 49),
        ("sit_ode", "repa-ode", {"num_inference_steps": 49}, None, 49),
        ("sit_sde_sigma", "repa-sde", {"num_inference_steps": 50}, None, 50),
    ],
)
def test_equals_the_official_sampler(expected, case, preset, arguments, guidance, calls):
    scheduler, sigmas = sampler_preset(preset, **{"num_inference_steps": 50, **arguments})
    reached, times = drive(scheduler, sigmas, expected, guidance, expected.get(f"{case}.noise", ()))
    assert len(times) == calls
    difference = (reached.double() - expected[case].double()).abs().max().item()
    assert difference <= TOLERANCE, f"{case}: {difference:.2e}"
    if f"{case}.times" in expected:
        torch.testing.assert_close(
            torch.tensor(times, dtype=torch.float64), expected[f"{case}.times"], rtol=0, atol=1e-6
        )


def test_the_interval_matters(expected):
    """The guided cases would not pass unguided or guided everywhere."""
    scheduler, sigmas = sampler_preset("repa-ode", 50)
    everywhere, _ = drive(scheduler, sigmas, expected, (1.8, GuidanceInterval()))
    assert (everywhere - expected["repa_ode_cfg_interval"]).abs().max() > 1e-2

"""The published samplers as data, and the grid that belongs to a scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from repagen.errors import UserError
from repagen.flow.time import TimeShift
from repagen.schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from repagen.schedulers.euler_truncated import FlowMatchEulerTruncatedScheduler
from repagen.schedulers.grid import ExplicitGridScheduler, checked_sigmas, linear_sigmas_to_zero
from repagen.schedulers.heun import FlowMatchHeunScheduler

DISCRETE_SCHEDULERS = (DDPMScheduler, DDIMScheduler)
"""diffusers' schedulers over the integer steps of a DDPM, for generators that count time so (DiT)."""


@dataclass(frozen=True)
class SamplerPreset:
    """One published sampler.

    Attributes:
        scheduler: class that steps.
        num_inference_steps: published number, in the publication's own counting.
        shift: alpha of the time shift; None for the integer steps of a DDPM, which have none.
        source: where it was published.
        arguments: what else the scheduler is made with.
    """

    scheduler: type[Any]
    num_inference_steps: int
    shift: float | None
    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _rae_shift(channels: int, height: int, width: int) -> float:
    return TimeShift.for_latent_shape((channels, height, width)).alpha


# DiT's forward process and network output; its official sampler does not clip, since latents are not pixels.
_DIT = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}

# SVG and LightningDiT write the shift for their own direction of time, in which alpha is 1 / theirs.
SAMPLER_PRESETS: dict[str, SamplerPreset] = {
    "repa-ode": SamplerPreset(FlowMatchEulerDiscreteScheduler, 50, 1.0, "REPA 2410.06940, Euler to 0"),
    "repa-heun": SamplerPreset(FlowMatchHeunScheduler, 50, 1.0, "REPA 2410.06940, Heun, last step Euler"),
    "repa-sde": SamplerPreset(FlowMatchEulerMaruyamaScheduler, 250, 1.0, "REPA 2410.06940, SDE of its tables"),
    "rae-euler": SamplerPreset(
        FlowMatchEulerTruncatedScheduler, 50, _rae_shift(768, 16, 16), "RAE 2510.11690 at 256 px: 50 points, 49 steps"
    ),
    "rae-euler-512": SamplerPreset(
        FlowMatchEulerTruncatedScheduler, 50, _rae_shift(768, 32, 32), "RAE 2510.11690 at 512 px: 50 points, 49 steps"
    ),
    "raev2-euler": SamplerPreset(
        FlowMatchEulerDiscreteScheduler, 100, _rae_shift(1024, 16, 16), "RAEv2 2605.18324 at 256 px, Euler to 0"
    ),
    "sit-ode": SamplerPreset(
        FlowMatchEulerTruncatedScheduler,
        250,
        1.0,
        "SiT 2401.08740, its code's fixed-step Euler: 250 points, 249 steps (its ODE figures used adaptive dopri5)",
        {"last_sigma": 0.0},
    ),
    "sit-sde": SamplerPreset(
        FlowMatchEulerMaruyamaScheduler, 250, 1.0, "SiT 2401.08740, Euler-Maruyama, w = sigma, last step mean of 0.04"
    ),
    "svg-euler": SamplerPreset(FlowMatchEulerDiscreteScheduler, 25, 1 / 0.15, "SVG 2510.15301, Euler to 0"),
    "svg-heun": SamplerPreset(
        FlowMatchHeunScheduler, 25, 1 / 0.15, "SVG 2510.15301, Heun in every step", {"last_step": "heun"}
    ),
    "lightningdit-euler": SamplerPreset(
        FlowMatchEulerTruncatedScheduler,
        250,
        1 / 0.3,
        "LightningDiT 2501.01423: 250 points, 249 steps to 0",
        {"last_sigma": 0.0},
    ),
    "ddt-euler": SamplerPreset(
        FlowMatchEulerTruncatedScheduler,
        250,
        1.0,
        "DDT 2504.05741: 250 points to 0.04, then one step to 0",
        {"last_sigma": 0.04, "final_step_to_zero": True},
    ),
    "dit-ddpm": SamplerPreset(
        DDPMScheduler,
        250,
        None,
        "DiT 2212.09748, DDPM with learned variance on steps round(999 i / 249)",
        {**_DIT, "variance_type": "learned_range", "timestep_spacing": "linspace"},
    ),
    "dit-ddim": SamplerPreset(
        DDIMScheduler,
        50,
        None,
        "DDIM 2010.02502 (eta 0) on DiT's steps 1000 i / N",
        {**_DIT, "timestep_spacing": "leading"},
    ),
}


def sampler_preset(
    name: str, num_inference_steps: int | None = None, shift: float | None = None
) -> tuple[SchedulerMixin, list[float] | None]:
    """Return the scheduler of a published sampler, its grid laid, and the unshifted sigmas of that grid.

    For each t of `scheduler.timesteps`, `x = scheduler.step(v, t, x).prev_sample` with v the velocity at (x, t / 1000)
    walks exactly the published grid, once; `scheduler.set_timesteps(sigmas=sigmas)` lays it anew. "dit-ddpm" and
    "dit-ddim" walk integer steps, without sigmas (None): t is then the model's own time, and v its raw output.

    Args:
        name: key of `SAMPLER_PRESETS`.
        num_inference_steps: the published number by default, in the publication's counting (RAE counts grid points).
        shift: alpha of the time shift; the published one by default.

    Raises:
        UserError: unknown name, a number of steps without a grid, or a shift of integer steps.
    """
    if name not in SAMPLER_PRESETS:
        raise UserError(f"sampler preset {name!r} is unknown; allowed: {', '.join(SAMPLER_PRESETS)}")
    preset = SAMPLER_PRESETS[name]
    steps = preset.num_inference_steps if num_inference_steps is None else num_inference_steps
    scheduler: Any
    if preset.shift is None:
        if shift not in (None, 1):
            raise UserError(f"sampler preset {name!r} walks integer steps, which have no time shift; shift is {shift}")
        scheduler = preset.scheduler(**preset.arguments)
    else:
        alpha = preset.shift if shift is None else TimeShift(shift).alpha
        scheduler = preset.scheduler(shift=alpha, **preset.arguments)
    return scheduler, lay_grid(scheduler, steps)


def lay_grid(
    scheduler: Any,
    num_inference_steps: int,
    sigmas: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> list[float] | None:
    """Set the timesteps of a scheduler to the grid that belongs to it, or to given sigmas.

    Args:
        scheduler: of ours, diffusers' `FlowMatchEulerDiscreteScheduler`, or one of `DISCRETE_SCHEDULERS`.
        num_inference_steps: in the scheduler's counting; unused where `sigmas` are given.
        sigmas: unshifted falling times in [0, 1] for the grid.
        device: of `timesteps`.

    Returns:
        The unshifted sigmas; None for integer steps.

    Raises:
        UserError: a scheduler of another kind, sigmas that do not fall within [0, 1], sigmas for integer steps, or a
            number of steps without a grid.
    """
    discrete = isinstance(scheduler, DISCRETE_SCHEDULERS)
    if not discrete:
        grid = unshifted_sigmas(scheduler, num_inference_steps) if sigmas is None else checked_sigmas(sigmas).tolist()
        scheduler.set_timesteps(sigmas=grid, device=device)
        return grid
    if sigmas is not None:
        raise UserError(f"sigmas were given, but {type(scheduler).__name__} walks integer steps; leave them out")
    most = scheduler.config["num_train_timesteps"]
    if not 1 <= num_inference_steps <= most:
        raise UserError(f"num_inference_steps is {num_inference_steps}; give at least 1 and at most {most}")
    # diffusers accumulates these products in float32, which costs four digits of the 1 - ratio in its steps.
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.set_timesteps(num_inference_steps, device=device)
    return None


def unshifted_sigmas(scheduler: SchedulerMixin, num_inference_steps: int) -> list[float]:
    """Grid that belongs to a scheduler, before its shift; also of one that was saved and loaded.

    Raises:
        UserError: a scheduler without explicit sigmas on the straight path, or a number of steps without a grid.
    """
    if isinstance(scheduler, ExplicitGridScheduler):
        return scheduler.default_sigmas(num_inference_steps)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return linear_sigmas_to_zero(num_inference_steps)
    raise UserError(
        f"scheduler {type(scheduler).__name__} takes no explicit grid of flow times; use "
        "FlowMatchEulerDiscreteScheduler or a scheduler of repagen.sampler_preset"
    )

"""The published samplers as data, and the grid that belongs to a scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from repagen.errors import UserError
from repagen.flow.time import TimeShift
from repagen.schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from repagen.schedulers.euler_truncated import FlowMatchEulerTruncatedScheduler
from repagen.schedulers.grid import ExplicitGridScheduler, linear_sigmas_to_zero
from repagen.schedulers.heun import FlowMatchHeunScheduler


@dataclass(frozen=True)
class SamplerPreset:
    """One published sampler.

    Attributes:
        scheduler: class that steps.
        num_inference_steps: published number, in the publication's own counting.
        shift: alpha of the time shift.
        source: where it was published.
    """

    scheduler: type[SchedulerMixin]
    num_inference_steps: int
    shift: float
    source: str


def _rae_shift(channels: int, height: int, width: int) -> float:
    return TimeShift.for_latent_shape((channels, height, width)).alpha


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
}


def sampler_preset(
    name: str, num_inference_steps: int | None = None, shift: float | None = None
) -> tuple[SchedulerMixin, list[float]]:
    """Return the scheduler and the unshifted sigmas of a published sampler.

    `scheduler.set_timesteps(sigmas=sigmas)`, then `x = scheduler.step(v, t, x).prev_sample` for each t of
    `scheduler.timesteps` with v the velocity at (x, t / 1000), walks exactly the published grid.

    Args:
        name: key of `SAMPLER_PRESETS`.
        num_inference_steps: the published number by default, in the publication's counting (RAE counts grid points).
        shift: alpha of the time shift; the published one by default.

    Raises:
        UserError: unknown name, or a number of steps without a grid.
    """
    if name not in SAMPLER_PRESETS:
        raise UserError(f"sampler preset {name!r} is unknown; allowed: {', '.join(SAMPLER_PRESETS)}")
    preset = SAMPLER_PRESETS[name]
    scheduler = preset.scheduler(shift=preset.shift if shift is None else TimeShift(shift).alpha)
    steps = preset.num_inference_steps if num_inference_steps is None else num_inference_steps
    return scheduler, unshifted_sigmas(scheduler, steps)


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

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from repagen import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchEulerTruncatedScheduler,
    FlowMatchHeunScheduler,
    UserError,
)
from repagen.schedulers.presets import SAMPLER_PRESETS, lay_grid, sampler_preset, unshifted_sigmas

OURS = [FlowMatchEulerTruncatedScheduler, FlowMatchHeunScheduler, FlowMatchEulerMaruyamaScheduler]


def integrate(scheduler, velocity, x, **arguments):
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep / 1000), timestep, x, **arguments).prev_sample
    return x


@pytest.mark.parametrize("cls", OURS)
def test_config_survives_saving(cls, tmp_path):
    scheduler = cls(shift=4.0, **({} if cls is FlowMatchHeunScheduler else {"last_sigma": 0.02}))
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    fields = ["num_train_timesteps", "shift", *([] if cls is FlowMatchHeunScheduler else ["last_sigma"])]
    assert [loaded.config[key] for key in fields] == [scheduler.config[key] for key in fields]
    assert loaded.shift == 4.0
    assert unshifted_sigmas(loaded, 7) == unshifted_sigmas(scheduler, 7)


@pytest.mark.parametrize("cls", [FlowMatchEulerTruncatedScheduler, FlowMatchHeunScheduler])
def test_steps_are_exact_on_a_constant_field(cls):
    scheduler = cls(shift=3.0)
    scheduler.set_timesteps(5)
    x = torch.zeros(1, 2)
    end = integrate(scheduler, lambda x, t: torch.ones_like(x), x)
    torch.testing.assert_close(end, x - 1 + scheduler.sigmas[-1])


def test_set_shift_acts_from_the_next_grid_on():
    scheduler = FlowMatchHeunScheduler()
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))
    scheduler.set_shift(3.0)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_heun_lists_the_time_of_every_model_call():
    scheduler = FlowMatchHeunScheduler()
    scheduler.set_timesteps(3)
    expected = torch.tensor([1.0, 2 / 3, 2 / 3, 1 / 3, 1 / 3]) * 1000
    torch.testing.assert_close(scheduler.timesteps, expected)
    assert scheduler.order == 2 and scheduler.num_inference_steps == 3


def test_heun_is_second_order():
    class HeunToTheEnd(FlowMatchHeunScheduler):
        """Ends at its last sigma, with no Euler step to 0 whose first-order error would hide the order."""

        def _grid(self, shifted):
            return torch.cat([shifted, shifted[-1:] - 1e-12])

    def error(steps):
        scheduler = HeunToTheEnd()
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0.2, steps + 1).tolist())
        end = integrate(scheduler, lambda x, t: -x * t, torch.ones(1))  # x = exp((1 - t^2) / 2)
        return abs(end.item() - math.exp(0.48))

    assert 3.4 < error(4) / error(8) < 4.6


def test_heun_resumes_in_the_middle_at_the_begin_of_a_step():
    whole = FlowMatchHeunScheduler()
    whole.set_timesteps(4)
    states = [torch.ones(1, 1)]
    for t in whole.timesteps:
        states.append(whole.step(states[-1] * t / 1000, t, states[-1]).prev_sample)
    part = FlowMatchHeunScheduler()
    part.set_timesteps(4)
    assert part.index_for_timestep(part.timesteps[1]) == 2  # the second of the equal timesteps
    x = states[2]
    for t in part.timesteps[2:]:
        x = part.step(x * t / 1000, t, x).prev_sample
    torch.testing.assert_close(x, states[-1], rtol=0, atol=0)


def test_begin_index_overrides_the_first_timestep():
    scheduler = FlowMatchEulerTruncatedScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    scheduler.step(torch.ones(1), scheduler.timesteps[2], torch.ones(1))
    assert scheduler.begin_index == 2 and scheduler.step_index == 3


@pytest.mark.parametrize("cls", OURS)
def test_state_is_float32_and_the_result_has_the_models_dtype(cls):
    exact, rounded = cls(), cls()
    for scheduler in (exact, rounded):
        scheduler.set_timesteps(6)
    t, noise = exact.timesteps[0], torch.randn(2, 3)
    x, v = torch.randn(2, 3), torch.randn(2, 3).bfloat16()
    draws = {"variance_noise": noise} if cls is FlowMatchEulerMaruyamaScheduler else {}
    low = rounded.step(v, t, x, **draws).prev_sample
    high = exact.step(v.float(), t, x, **draws).prev_sample
    assert low.dtype == torch.bfloat16 and high.dtype == torch.float32
    assert torch.equal(low, high.bfloat16())


@pytest.mark.parametrize("form", ["sigma", "constant", "increasing-decreasing"])
def test_every_diffusion_form_keeps_the_marginals(form):
    """Exact field of data N(0, 0.5^2): samples must have its variance whatever noise is put in."""
    spread = 0.5

    def velocity(x, t):
        return x * (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2)

    scheduler = FlowMatchEulerMaruyamaScheduler(diffusion_form=form, last_sigma=1e-3)
    scheduler.set_timesteps(600)
    generator = torch.Generator().manual_seed(0)
    end = integrate(scheduler, velocity, torch.randn(10000, 1, generator=generator), generator=generator)
    assert end.std().item() == pytest.approx(spread, rel=0.03)


def test_a_list_of_generators_gives_every_sample_its_own_noise():
    def run(batch):
        scheduler = FlowMatchEulerMaruyamaScheduler()
        scheduler.set_timesteps(4)
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        return integrate(scheduler, lambda x, t: x, torch.ones(len(batch), 2), generator=generators)

    together = run([5, 6, 7])
    torch.testing.assert_close(run([6]), together[1:2])
    assert not torch.equal(together[0], together[1])


def test_sde_draws_noise_in_every_step_but_the_last():
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(4)
    steps = []
    for t in scheduler.timesteps:
        x = torch.zeros(1, 1)
        steps.append(scheduler.step(torch.zeros(1, 1), t, x, variance_noise=torch.ones(1, 1)).prev_sample.item())
    assert steps[-1] == 0.0 and min(steps[:-1]) > 0


def test_tuple_output():
    scheduler = FlowMatchHeunScheduler()
    scheduler.set_timesteps(2)
    (moved,) = scheduler.step(torch.ones(1), scheduler.timesteps[0], torch.ones(1), return_dict=False)
    torch.testing.assert_close(moved, torch.full((1,), 0.5))


FLOW_PRESETS = [name for name, preset in SAMPLER_PRESETS.items() if preset.shift is not None]


@pytest.mark.parametrize("name", FLOW_PRESETS)
def test_presets_lay_their_published_grid(name):
    scheduler, sigmas = sampler_preset(name)
    laid = scheduler.sigmas.clone()
    scheduler.set_timesteps(sigmas=sigmas)
    assert torch.equal(scheduler.sigmas, laid)
    assert float(scheduler.sigmas[0]) == 1.0 and bool((scheduler.sigmas.diff() < 0).all())
    ends = {"rae-euler": 0.00689, "rae-euler-512": 0.01368}
    assert float(scheduler.sigmas[-1]) == pytest.approx(ends.get(name, 0.0), abs=1e-5)
    assert len(sigmas) == SAMPLER_PRESETS[name].num_inference_steps


@pytest.mark.parametrize(
    ("name", "calls"),
    [("repa-heun", 99), ("sit-ode", 249), ("sit-sde", 250), ("svg-heun", 50), ("lightningdit-euler", 249),
     ("ddt-euler", 250), ("rae-euler", 49), ("dit-ddpm", 250), ("dit-ddim", 50)],
)  # fmt: skip
def test_presets_make_their_published_number_of_calls(name, calls):
    assert len(sampler_preset(name)[0].timesteps) == calls


def test_the_largest_step_of_ddts_grid_is_the_last():
    sigmas = sampler_preset("ddt-euler")[0].sigmas
    torch.testing.assert_close(sigmas[-2:], torch.tensor([0.04, 0.0]))
    assert (-sigmas.diff()).argmax() == 249


def test_ddpm_steps_are_spread_as_published_and_have_no_sigmas():
    scheduler, sigmas = sampler_preset("dit-ddpm")
    assert sigmas is None
    assert scheduler.timesteps.tolist() == [round(index * 999 / 249) for index in reversed(range(250))]
    assert (scheduler.config.variance_type, scheduler.config.clip_sample) == ("learned_range", False)
    scheduler, _ = sampler_preset("dit-ddim", 25, shift=1.0)
    assert scheduler.timesteps.tolist() == list(range(960, -1, -40))


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchEulerTruncatedScheduler])
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([0.5, 1.0], "run from 0.5 to 1;"),
        ([1.0, 1.0, 0.5], "run from 1 to 0.5;"),
        ([2.0, 1.0], "run from 2 to 1;"),
        ([0.5, -0.5], "run from 0.5 to -0.5;"),
        ([float("nan")], "run from nan to nan;"),
        ([], r"has shape \(0,\);"),
        (5, r"has shape \(\);"),
        ("ab", "is 'ab';"),
    ],
)
def test_sigmas_that_do_not_fall_are_refused(scheduler, sigmas, message):
    with pytest.raises(UserError, match=f"sigmas {message} give (a list of )?falling times"):
        lay_grid(scheduler(), 4, sigmas)


def test_integer_steps_refuse_shift_and_sigmas():
    with pytest.raises(UserError, match="'dit-ddpm' walks integer steps, which have no time shift; shift is 2"):
        sampler_preset("dit-ddpm", shift=2)
    with pytest.raises(UserError, match="sigmas were given, but DDPMScheduler walks integer steps"):
        lay_grid(DDPMScheduler(), 4, sigmas=[1.0, 0.5])
    for steps in (0, 1001):
        with pytest.raises(UserError, match=f"num_inference_steps is {steps}; give at least 1 and at most 1000"):
            sampler_preset("dit-ddim", steps)


def test_heun_reaches_the_end_by_heun_on_request():
    """On v = 1 - t the Euler step to 0 errs, Heun's does not."""
    ends = {}
    for last_step in ("euler", "heun"):
        scheduler = FlowMatchHeunScheduler(last_step=last_step)
        scheduler.set_timesteps(3)
        ends[last_step] = integrate(scheduler, lambda x, t: (1 - t) * torch.ones(1), torch.zeros(1)).item()
    assert ends["heun"] == pytest.approx(-0.5) and ends["euler"] == pytest.approx(-0.5 + 1 / 18)
    with pytest.raises(UserError, match="last_step is 'rk4'; allowed: euler, heun"):
        FlowMatchHeunScheduler(last_step="rk4")


def test_unknown_preset_names_the_allowed():
    with pytest.raises(UserError, match="'ddim' is unknown; allowed: repa-ode, repa-heun, repa-sde, rae-euler"):
        sampler_preset("ddim")


def test_the_grid_follows_the_scheduler_instance():
    assert unshifted_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 4) == [1.0, 0.75, 0.5, 0.25]
    assert unshifted_sigmas(FlowMatchEulerTruncatedScheduler(last_sigma=0.5), 2) == [1.0, 0.5]
    with pytest.raises(UserError, match="DDPMScheduler takes no explicit grid"):
        unshifted_sigmas(DDPMScheduler(), 4)


@pytest.mark.parametrize(
    ("cls", "sigmas", "message"),
    [
        (FlowMatchHeunScheduler, [1.0, 0.5, 0.0], "end with 0"),
        (FlowMatchHeunScheduler, [0.5, 1.0], "falling"),
        (FlowMatchHeunScheduler, [1000.0, 500.0], "falling times in"),
        (FlowMatchHeunScheduler, [], "give a list"),
        (FlowMatchEulerTruncatedScheduler, [1.0], "at least 2"),
    ],
)
def test_bad_grids_are_refused(cls, sigmas, message):
    with pytest.raises(UserError, match=message):
        cls().set_timesteps(sigmas=sigmas)


@pytest.mark.parametrize("cls", OURS)
def test_misuse_of_step_is_named(cls):
    scheduler = cls()
    with pytest.raises(UserError, match="neither num_inference_steps nor sigmas"):
        scheduler.set_timesteps()
    with pytest.raises(UserError, match="before set_timesteps"):
        scheduler.step(torch.ones(1), 1000.0, torch.ones(1))
    scheduler.set_timesteps(2)
    with pytest.raises(UserError, match="not on the sampler's grid"):
        scheduler.step(torch.ones(1), 3, torch.ones(1))
    x = torch.ones(1)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(UserError, match="has made all its"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_unknown_diffusion_form_is_refused():
    with pytest.raises(UserError, match="'brownian'; allowed: sigma, constant"):
        FlowMatchEulerMaruyamaScheduler(diffusion_form="brownian")

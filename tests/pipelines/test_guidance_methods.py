"""Methods of guidance, the options that choose them, and how many evaluations they make."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closed_forms import FormulaTransformer, entangled_field, formula_pipeline, golden_field
from diffusers import FirstBlockCacheConfig
from tiny_pipelines import CHANNELS, NUM_CLASSES, SIDE, inputs, tiny_pipeline, tiny_transformer

from repagen import (
    ClassToImagePipeline,
    DDPMDiTTransformer2DModel,
    ELTTransformer2DModel,
    RAEv2Transformer2DModel,
    UserError,
    sampler_preset,
)

INTERNAL = {"guidance_method": "internal", "guidance_scale": 2.0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def forwards(model: Any) -> list[dict[str, Any]]:
    """A list that grows by the arguments of every forward pass of the model."""
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


class TestEveryGenerator:
    def test_is_saved_loaded_and_sampled_without_a_warning(self, make_any_pipe, tmp_path, caplog):
        pipe = make_any_pipe(sampling_defaults={"guidance_scale": 1.5})
        with caplog.at_level(logging.WARNING):
            pipe.save_pretrained(tmp_path)
            loaded = ClassToImagePipeline.from_pretrained(tmp_path)
        assert not caplog.records
        again = ClassToImagePipeline.from_pipe(loaded)
        again.set_progress_bar_config(disable=True)
        assert type(again.transformer) is make_any_pipe.transformer_class and again.vae is loaded.vae
        call = inputs(guidance_scale=None, num_inference_steps=3)
        expected = pipe(**call).images
        assert torch.equal(again(**inputs(guidance_scale=None, num_inference_steps=3)).images, expected)

    @pytest.mark.parametrize("method", ["cfg", "autoguidance"])
    def test_is_guided(self, make_any_pipe, method):
        pipe = make_any_pipe(guidance_transformer=make_any_pipe.weaker())
        calls, weaker_calls = forwards(pipe.transformer), forwards(pipe.guidance_transformer)
        plain = pipe(**inputs(guidance_scale=1.0)).images
        assert (len(calls), len(weaker_calls)) == (2, 0)
        guided = pipe(**inputs(guidance_method=method)).images
        assert not torch.equal(plain, guided)
        assert (len(calls), len(weaker_calls)) == ((6, 0) if method == "cfg" else (4, 2))
        assert all(len(call["hidden_states"]) == 1 for call in calls)


class TestInternalGuidance:
    def test_is_one_forward_of_the_batch_a_step(self):
        pipe = tiny_pipeline(RAEv2Transformer2DModel, scheduler=sampler_preset("repa-ode")[0])
        calls = forwards(pipe.transformer)
        pipe(**inputs(class_labels=[0, 1, 2], num_inference_steps=10, guidance_interval=(0.3, 0.7), **INTERNAL))
        assert [len(call["hidden_states"]) for call in calls] == 10 * [3]
        # t = 1, 0.9 ... 0.1, of which 0.7 to 0.3 lie inside
        assert [call.get("return_base", False) for call in calls] == 3 * [False] + 5 * [True] + 2 * [False]

    def test_extrapolates_the_data_from_the_base_heads(self):
        pipe = tiny_pipeline(RAEv2Transformer2DModel)
        x, label = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded()), torch.tensor([1])
        found = pipe(**inputs(latents=x, num_inference_steps=4, output_type="latent", **INTERNAL)).images
        grid = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        with torch.no_grad():
            for t, t_next in itertools.pairwise(2 * grid / (1 + grid)):
                out = pipe.transformer(x, t.expand(1), label, return_base=True)
                data = out.base_sample + 2.0 * (out.sample - out.base_sample)
                x = x + (t_next - t) * (x - data) / t
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)

    def test_needs_no_null_class(self):
        transformer = tiny_transformer(RAEv2Transformer2DModel, num_classes=0, class_dropout_prob=0.0)
        pipe = tiny_pipeline(transformer=transformer)
        assert pipe(**inputs(class_labels=None, **INTERNAL)).images.isfinite().all()

    def test_needs_a_base_head(self):
        with pytest.raises(UserError, match="SiTTransformer2DModel has no base head; use 'cfg' or 'autoguidance'"):
            tiny_pipeline()(**inputs(**INTERNAL))

    def test_names_a_cache_that_it_cannot_work_with(self):
        pipe = tiny_pipeline(RAEv2Transformer2DModel)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(UserError, match="FirstBlockCacheConfig"):
            pipe(**inputs(**INTERNAL))


class TestChannels:
    def test_only_the_first_are_guided(self, make_flow_pipe):
        pipe = make_flow_pipe()
        call = {"num_inference_steps": 1, "output_type": "latent"}
        plain = pipe(**inputs(guidance_scale=1.0, **call)).images
        full = pipe(**inputs(guidance_scale=3.0, **call)).images
        three = pipe(**inputs(guidance_scale=3.0, guidance_channels=3, **call)).images
        assert torch.equal(three[:, :3], full[:, :3]) and torch.equal(three[:, 3:], plain[:, 3:])
        assert not torch.equal(three[:, :3], plain[:, :3])

    def test_the_learned_variance_is_never_guided(self):
        class Record:
            outputs: list[torch.Tensor] = []  # noqa: RUF012

        pipe = tiny_pipeline(DDPMDiTTransformer2DModel)
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda output, *args, **kwargs: (
            Record.outputs.append(output),
            step(output, *args, **kwargs),
        )[1]
        x = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        pipe(**inputs(latents=x, num_inference_steps=1, guidance_scale=3.0))
        with torch.no_grad():
            last = torch.tensor([0])  # a grid of one step is step 0
            strong, weak = (pipe.transformer(x, last, torch.tensor([label])).sample for label in (1, NUM_CLASSES))
        (output,) = Record.outputs
        assert output.shape[1] == 2 * CHANNELS
        torch.testing.assert_close(output[:, CHANNELS:], strong[:, CHANNELS:])
        torch.testing.assert_close(output[:, :CHANNELS], (weak + 3.0 * (strong - weak))[:, :CHANNELS])


class TestZeroedFirstSteps:
    @pytest.mark.parametrize(("preset", "steps", "evaluations"), [("svg-euler", 10, 9), ("svg-heun", 10, 18)])
    def test_they_evaluate_nothing_and_move_nothing(self, preset, steps, evaluations):
        pipe = tiny_pipeline(scheduler=sampler_preset(preset)[0])
        calls = forwards(pipe.transformer)
        states = []

        def look(pipeline, index, timestep, tensors):
            states.append(tensors["latents"].clone())
            return tensors

        start = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        call = {"num_inference_steps": steps, "zero_init_steps": 1, "callback_on_step_end": look, "latents": start}
        pipe(**inputs(**call))
        assert len(calls) == 2 * evaluations
        zeroed = pipe.scheduler.order
        assert all(torch.equal(state, start) for state in states[:zeroed])
        assert not torch.equal(states[zeroed], start)

    def test_they_belong_to_guidance(self):
        pipe = tiny_pipeline()
        plain = pipe(**inputs(guidance_scale=1.0)).images
        assert torch.equal(pipe(**inputs(guidance_scale=1.0, zero_init_steps=1)).images, plain)

    def test_integer_steps_have_no_velocity(self):
        with pytest.raises(UserError, match="zero_init_steps needs a velocity"):
            tiny_pipeline(DDPMDiTTransformer2DModel)(**inputs(zero_init_steps=1))


class TestIntegerSteps:
    def test_interval_counts_in_thousandths_and_saves_evaluations(self):
        pipe = tiny_pipeline(DDPMDiTTransformer2DModel)
        calls = forwards(pipe.transformer)
        pipe(**inputs(num_inference_steps=10, guidance_interval=(0.222, 0.6)))
        # steps 999, 888 ... 111, 0, of which 555, 444, 333 and 222 lie inside
        assert [int(call["timestep"][0]) for call in calls] == [
            999, 888, 777, 666, 555, 555, 444, 444, 333, 333, 222, 222, 111, 0,
        ]  # fmt: skip

    def test_ddim_takes_the_noise_alone(self):
        pipe = tiny_pipeline(DDPMDiTTransformer2DModel, scheduler=sampler_preset("dit-ddim")[0])
        first, second = (pipe(**inputs(num_inference_steps=4, output_type="latent")).images for _ in range(2))
        assert first.shape == (1, CHANNELS, SIDE, SIDE) and torch.equal(first, second)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: tiny_pipeline(scheduler=sampler_preset("dit-ddpm")[0]),
             "scheduler DDPMScheduler takes no explicit grid of flow times, which SiTTransformer2DModel"),
            (lambda: tiny_pipeline(DDPMDiTTransformer2DModel, scheduler=sampler_preset("sit-ode")[0]),
             "scheduler FlowMatchEulerTruncatedScheduler takes no integer steps, which DDPMDiT.* use 'dit-ddpm'"),
            (lambda: tiny_pipeline(
                DDPMDiTTransformer2DModel,
                transformer=tiny_transformer(DDPMDiTTransformer2DModel, learn_sigma=False)),
             "predicts no variance"),
            (lambda: tiny_pipeline(DDPMDiTTransformer2DModel, guidance_transformer=tiny_transformer()),
             "guidance_transformer has discrete_time False, the transformer True"),
        ],
    )  # fmt: skip
    def test_components_that_do_not_fit_are_named(self, make: Callable[[], Any], message):
        with pytest.raises(UserError, match=message):
            make()(**inputs())

    def test_sigmas_are_refused(self):
        with pytest.raises(UserError, match="sigmas were given, but DDPMScheduler walks integer steps"):
            tiny_pipeline(DDPMDiTTransformer2DModel)(**inputs(sigmas=[1.0, 0.5]))


class TestLoops:
    def test_fewer_loops_make_fewer_passes(self):
        pipe = tiny_pipeline(ELTTransformer2DModel)
        passes = forwards(pipe.transformer.blocks[0])
        images = {}
        for loops in (None, 1, 3):
            passes.clear()
            images[loops] = pipe(**inputs(guidance_scale=1.0, num_loops=loops)).images
            assert len(passes) == 2 * (loops or 3)
        assert torch.equal(images[None], images[3]) and not torch.equal(images[1], images[3])

    def test_loops_of_a_model_without_are_refused(self):
        with pytest.raises(UserError, match="num_loops is 2, but the transformer is not looped"):
            tiny_pipeline()(**inputs(num_loops=2))

    @pytest.mark.parametrize("value", ["2", True, 1.5])
    @pytest.mark.parametrize("name", ["num_loops", "guidance_channels", "zero_init_steps"])
    def test_other_than_whole_numbers_are_refused(self, name, value):
        with pytest.raises(UserError, match=f"{name} is {value!r}; give a whole number"):
            tiny_pipeline(ELTTransformer2DModel)(**inputs(**{name: value}))

    def test_a_scale_that_is_no_number_is_refused(self):
        with pytest.raises(UserError, match="guidance_scale is '2'; give a finite number"):
            tiny_pipeline()(**inputs(guidance_scale="2"))

    def test_more_loops_than_the_model_has_are_refused(self):
        with pytest.raises(UserError, match="num_loops"):
            tiny_pipeline(ELTTransformer2DModel)(**inputs(num_loops=4))


class TestClassToken:
    """REG: a class token is drawn after the latents and denoised beside them, guided as they are."""

    @staticmethod
    def by_hand(latents, token, labels, grid, scale):
        null = torch.full_like(labels, 1000)
        for t, t_next in itertools.pairwise(grid):
            strong, weak = (entangled_field(latents, token, t, y) for y in (labels, null))
            velocities = [w + scale * (s - w) for s, w in zip(strong, weak, strict=True)]
            latents, token = (x + (t_next - t) * v for x, v in zip((latents, token), velocities, strict=True))
        return latents

    def test_walks_with_the_latents(self):
        pipe = formula_pipeline(sampler_preset("repa-ode")[0], golden_field, class_token_dim=6)
        labels = torch.tensor([3, 700])
        generator = seeded(7)
        latents, token = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 6, generator=generator)
        found = pipe(
            labels, num_inference_steps=12, guidance_scale=2.3, generator=seeded(7), output_type="latent"
        ).images
        wanted = self.by_hand(latents, token, labels, torch.linspace(1, 0, 13), 2.3)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def test_of_a_sit_is_denoised_by_its_own_prediction(self):
        pipe = tiny_pipeline(transformer=tiny_transformer(class_token_dim=6), scheduler=sampler_preset("repa-ode")[0])
        x = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        found = pipe(**inputs(latents=x, num_inference_steps=4, output_type="latent", generator=seeded(3))).images
        token = torch.randn(1, 6, generator=seeded(3))  # the latents were given, so the token is the first draw
        with torch.no_grad():
            for t, t_next in itertools.pairwise(torch.linspace(1, 0, 5)):
                strong, weak = (
                    pipe.transformer(x, t.expand(1), torch.tensor([label]), class_token=token)
                    for label in (1, NUM_CLASSES)
                )
                x = x + (t_next - t) * (weak.sample + 2.0 * (strong.sample - weak.sample))
                token = token + (t_next - t) * (weak.class_token + 2.0 * (strong.class_token - weak.class_token))
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("cached", [False, True])
    def test_shares_the_batch_of_a_cache(self, cached):
        pipe = tiny_pipeline(transformer=tiny_transformer(class_token_dim=6))
        if cached:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        calls = forwards(pipe.transformer)
        pipe(**inputs())
        assert [len(call["class_token"]) for call in calls] == ([2, 2] if cached else [1, 1, 1, 1])

    @pytest.mark.parametrize("preset", ["repa-heun", "repa-sde"])
    def test_schedulers_with_a_memory_and_noise_of_their_own(self, preset):
        pipe = formula_pipeline(sampler_preset(preset)[0], golden_field, class_token_dim=6)
        call = {"num_inference_steps": 4, "output_type": "latent"}
        both = pipe([1, 2], generator=[seeded(1), seeded(2)], **call).images
        alone = pipe(2, generator=[seeded(2)], **call).images
        torch.testing.assert_close(both[1:], alone)

    def test_a_weaker_model_must_have_one_too(self):
        pipe = formula_pipeline(sampler_preset("repa-ode")[0], golden_field, class_token_dim=6)
        pipe.guidance_transformer = FormulaTransformer()
        with pytest.raises(UserError, match="guidance_transformer has class_token_dim 0, the transformer 6"):
            pipe(1)


class TestSamplingDefaults:
    DEFAULTS = {  # noqa: RUF012
        "num_inference_steps": 3, "guidance_scale": 2.5, "guidance_interval": [0.2, 0.9], "guidance_channels": 3,
        "guidance_method": "cfg", "zero_init_steps": 1,
    }  # fmt: skip

    def test_they_are_saved_and_used(self, tmp_path):
        tiny_pipeline(sampling_defaults=self.DEFAULTS).save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["sampling_defaults"] == self.DEFAULTS
        pipe = ClassToImagePipeline.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
        found = pipe(1, generator=seeded(), output_type="pt").images
        assert (pipe.num_timesteps, pipe.guidance_scale, pipe.guidance_method) == (3, 2.5, "cfg")
        assert (pipe.guidance_interval.low, pipe.guidance_interval.high) == (0.2, 0.9)
        written_out = {**self.DEFAULTS, "guidance_interval": (0.2, 0.9)}
        assert torch.equal(tiny_pipeline()(1, generator=seeded(), output_type="pt", **written_out).images, found)

    def test_what_is_given_wins(self):
        pipe = tiny_pipeline(sampling_defaults=self.DEFAULTS)
        calls = forwards(pipe.transformer)
        pipe(1, num_inference_steps=5, guidance_scale=1.0, generator=seeded())
        assert len(calls) == 5

    def test_without_them_the_library_has_its_own(self):
        pipe = tiny_pipeline()
        pipe(1, generator=seeded())
        assert (pipe.num_timesteps, pipe.guidance_scale, pipe.guidance_method) == (50, 1.0, "cfg")

    @pytest.mark.parametrize(
        ("defaults", "message"),
        [
            (
                {"guidance": 2.0},
                "sampling_defaults: guidance is unknown; allowed: num_inference_steps, guidance_scale",
            ),
            ({"guidance_method": "cfg++"}, "guidance_method is 'cfg\\+\\+'; allowed: cfg, autoguidance, internal"),
            ({"guidance_interval": [0.9, 0.1]}, "0 <= low <= high <= 1"),
            ({"guidance_interval": [0.9]}, r"guidance_interval is \[0.9\]; give \(low, high\)"),
            ({"guidance_interval": 0.5}, r"guidance_interval is 0.5; give \(low, high\)"),
            ({"guidance_interval": ["a", "b"]}, r"guidance_interval is \['a', 'b'\]; give \(low, high\)"),
            ({"num_inference_steps": "many"}, "num_inference_steps is 'many'; give a whole number, at least 1"),
            (5, "sampling_defaults: must be options and their values, got 5"),
            ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
            ({"guidance_channels": 0}, "guidance_channels is 0; give a whole number, at least 1"),
            ({"zero_init_steps": -1}, "zero_init_steps is -1; give a whole number, at least 0"),
        ],
    )
    def test_wrong_ones_are_refused_at_once(self, defaults, message):
        with pytest.raises(UserError, match=message):
            tiny_pipeline(sampling_defaults=defaults)

    def test_more_channels_than_there_are(self):
        with pytest.raises(UserError, match="guidance_channels is 9; this model's latents have 8"):
            tiny_pipeline()(**inputs(guidance_channels=9))

    def test_autoguidance_asked_for_without_a_model(self):
        with pytest.raises(UserError, match="the pipeline has no guidance_transformer"):
            tiny_pipeline(sampling_defaults={"guidance_method": "autoguidance"})(**inputs())

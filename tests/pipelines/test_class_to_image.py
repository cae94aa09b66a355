"""What diffusers' own pipeline tests check (names as theirs), and what they do not."""

from __future__ import annotations

import inspect
import itertools
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderRAE, DDIMScheduler, DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image
from tiny_pipelines import (
    CHANNELS,
    ID2LABEL,
    NUM_CLASSES,
    PATCH,
    SIDE,
    PipelineMaker,
    inputs,
    tiny_components,
    tiny_pipeline,
    tiny_transformer,
)

from repagen import (
    ClassToImagePipeline,
    ELTTransformer2DModel,
    PixelAutoencoder,
    SiTTransformer2DModel,
    SVGAutoencoder,
    UserError,
    sampler_preset,
)

OUTPUT_SHAPE = (3, SIDE * PATCH, SIDE * PATCH)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestDiffusersChecks:
    """Inherited by the tests of other pipelines."""

    pipeline_class = ClassToImagePipeline
    conditions = frozenset({"class_labels"})
    files = 6
    inputs = staticmethod(inputs)
    components = staticmethod(tiny_components)
    same = staticmethod(torch.equal)

    @staticmethod
    def batch(count):
        return {"class_labels": [[1]] * count}

    @pytest.mark.parametrize("safe_serialization", [True, False])
    def test_save_load_local(self, make_pipe, tmp_path, safe_serialization):
        pipe = make_pipe()
        before = pipe(**self.inputs()).images
        pipe.save_pretrained(tmp_path, safe_serialization=safe_serialization)
        loaded = self.pipeline_class.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert self.same(loaded(**self.inputs()).images, before)

    def test_saving_twice_writes_the_same_bytes(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path / "a")
        self.pipeline_class.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
        files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
        assert len(files) == self.files
        for file in files:
            first, second = (tmp_path / side / file for side in "ab")
            if file.suffix == ".safetensors":
                assert first.read_bytes() == second.read_bytes()
            else:  # the folder a component came from is recorded under keys with an underscore
                public = [
                    {key: value for key, value in json.loads(path.read_text()).items() if key[0] != "_"}
                    for path in (first, second)
                ]
                assert public[0] == public[1]

    def test_output(self, make_pipe):
        images = make_pipe()(**self.inputs()).images
        assert images.shape == (1, *OUTPUT_SHAPE) and images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1

    def test_pipeline_call_signature(self):
        parameters = inspect.signature(self.pipeline_class.__call__).parameters
        optional = {name for name, parameter in parameters.items() if parameter.default is not inspect.Parameter.empty}
        assert {*self.conditions, "guidance_scale"} <= set(parameters)
        assert {
            "num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict",
        } <= optional  # fmt: skip

    def test_inference_batch_consistent(self, make_pipe):
        batch = make_pipe()(**self.inputs(**self.batch(2), generator=[seeded(0), seeded(1)])).images
        assert len(batch) == 2 and not torch.equal(batch[0], batch[1])

    def test_inference_batch_single_identical(self, make_pipe):
        pipe = make_pipe()
        single = pipe(**self.inputs()).images
        batch = pipe(**self.inputs(**self.batch(3), generator=[seeded(i) for i in range(3)])).images
        torch.testing.assert_close(batch[:1], single, rtol=0, atol=1e-5)

    def test_dict_tuple_outputs_equivalent(self, make_pipe):
        pipe = make_pipe()
        (images,) = pipe(**self.inputs(return_dict=False))
        assert torch.equal(pipe(**self.inputs())[0], images)

    def test_components_function(self, make_pipe):
        components = self.components(make_pipe.transformer_class)
        assert set(self.pipeline_class(**components).components) == set(components)
        weak = make_pipe.weaker()
        assert self.pipeline_class(**components, guidance_transformer=weak).components["guidance_transformer"] is weak

    def test_half_precision_inference_no_nan(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        pipe = self.pipeline_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.transformer.dtype == pipe.vae.dtype == torch.bfloat16
        images = pipe(**self.inputs()).images
        assert torch.isfinite(images).all()
        torch.testing.assert_close(images, make_pipe()(**self.inputs()).images, rtol=0, atol=0.1)

    def test_sampler_state_stays_float32_in_half_precision(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        pipe = self.pipeline_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        seen = []
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((kwargs["hidden_states"].dtype, kwargs["timestep"].dtype)),
            with_kwargs=True,
        )
        latents = pipe(**self.inputs(output_type="latent", num_inference_steps=3)).images
        times = torch.int64 if make_pipe.transformer_class.discrete_time else torch.float32
        assert set(seen) == {(torch.bfloat16, times)}
        assert latents.dtype == torch.float32 and not torch.equal(latents, latents.bfloat16().float())

    def test_save_load_optional_components(self, make_pipe, tmp_path):
        pipe = make_pipe(guidance_transformer=make_pipe.weaker())
        guided_by_model = pipe(**self.inputs()).images
        pipe.guidance_transformer = None
        without = pipe(**self.inputs()).images
        assert not torch.equal(without, guided_by_model)
        pipe.save_pretrained(tmp_path)
        loaded = self.pipeline_class.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.guidance_transformer is None
        assert self.same(loaded(**self.inputs()).images, without)

    def test_guidance_transformer_is_saved(self, make_pipe, tmp_path):
        pipe = make_pipe(guidance_transformer=make_pipe.weaker())
        pipe.save_pretrained(tmp_path)
        loaded = self.pipeline_class.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert self.same(loaded(**self.inputs()).images, pipe(**self.inputs()).images)

    @pytest.mark.parametrize("batch_size", [1, 2])
    @pytest.mark.parametrize("num_images_per_prompt", [1, 2])
    def test_num_images_per_prompt(self, make_pipe, batch_size, num_images_per_prompt):
        pipe = make_pipe()
        images = pipe(**self.inputs(**self.batch(batch_size)), num_images_per_prompt=num_images_per_prompt).images
        assert images.shape[0] == batch_size * num_images_per_prompt

    def test_cfg(self, make_pipe):
        pipe = make_pipe()
        plain, guided = (pipe(**self.inputs(guidance_scale=scale)).images for scale in (1.0, 7.5))
        assert plain.shape == guided.shape and not torch.equal(plain, guided)

    def test_callback_inputs(self, make_pipe):
        pipe = make_pipe()
        calls = []

        def record(pipeline, index, timestep, tensors):
            calls.append((index, float(timestep), set(tensors)))
            return tensors

        pipe(**self.inputs(callback_on_step_end=record, output_type="latent"))
        assert [call[0] for call in calls] == [0, 1]
        assert [call[1] for call in calls] == pipe.scheduler.timesteps.tolist()
        assert all(call[2] == {"latents"} for call in calls)
        pipe(
            **self.inputs(callback_on_step_end=record, callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs)
        )
        assert calls[-1][2] == set(pipe._callback_tensor_inputs)

        def zero_at_the_end(pipeline, index, timestep, tensors):
            if index == pipeline.num_timesteps - 1:
                tensors["latents"] = torch.zeros_like(tensors["latents"])
            return tensors

        latents = pipe(**self.inputs(callback_on_step_end=zero_at_the_end, output_type="latent"))[0]
        assert latents.abs().sum() == 0

    def test_callback_may_return_nothing_for_latents(self, make_pipe):
        pipe = make_pipe()
        images = pipe(**self.inputs(callback_on_step_end=lambda *_: {})).images
        assert torch.equal(images, pipe(**self.inputs()).images)

    def test_callback_cfg(self, make_pipe):
        pipe = make_pipe()

        def increase(pipeline, index, timestep, tensors):
            pipeline._guidance_scale += 1.0
            return tensors

        changed = pipe(**self.inputs(callback_on_step_end=increase)).images
        assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
        assert not torch.equal(changed, pipe(**self.inputs()).images)

    def test_callback_objects(self, make_pipe):
        class Record(PipelineCallback):
            def __init__(self):
                super().__init__()
                self.steps = []

            @property
            def tensor_inputs(self):
                return ["latents"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                self.steps.append(step_index)
                return callback_kwargs

        first, second = Record(), Record()
        make_pipe()(**self.inputs(callback_on_step_end=MultiPipelineCallbacks([first, second])))
        make_pipe()(**self.inputs(callback_on_step_end=first))
        assert first.steps == [0, 1, 0, 1] and second.steps == [0, 1]

    def test_interrupt(self, make_pipe):
        pipe = make_pipe()
        states = []

        def stop_after_two(pipeline, index, timestep, tensors):
            states.append(tensors["latents"])
            pipeline._interrupt = index == 1
            return tensors

        call = self.inputs(callback_on_step_end=stop_after_two, num_inference_steps=5, output_type="latent")
        latents = pipe(**call).images
        assert len(states) == 2 and torch.equal(latents, states[-1])

    @pytest.mark.parametrize(("safe_serialization", "suffix"), [(True, "safetensors"), (False, "bin")])
    def test_serialization_and_loading_with_variants(self, make_pipe, tmp_path, safe_serialization, suffix):
        pipe = make_pipe()
        pipe.save_pretrained(tmp_path, variant="ema", safe_serialization=safe_serialization)
        for name in ("transformer", "vae"):
            assert (tmp_path / name / f"diffusion_pytorch_model.ema.{suffix}").is_file()
        loaded = self.pipeline_class.from_pretrained(tmp_path, variant="ema")
        for name in ("transformer", "vae"):
            saved, found = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
            assert saved.keys() == found.keys() and all(torch.equal(saved[key], found[key]) for key in saved)

    def test_loading_with_incorrect_variants_raises_error(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="variant=fp16"):
            self.pipeline_class.from_pretrained(tmp_path, variant="fp16")

    def test_dtype_dict(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
        loaded = self.pipeline_class.from_pretrained(tmp_path, dtype=dtypes)
        assert loaded.transformer.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float16

    def test_to_dtype(self, make_pipe):
        pipe = make_pipe().to(dtype=torch.float16)
        assert pipe.transformer.dtype == pipe.vae.dtype == torch.float16

    def test_device_map(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        loaded = self.pipeline_class.from_pretrained(tmp_path, device_map="cpu")
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(loaded(**self.inputs()).images, make_pipe()(**self.inputs()).images)

    def test_model_cpu_offload_forward_pass_twice(self, make_pipe):
        pipe = make_pipe(guidance_transformer=make_pipe.weaker())
        expected = pipe(**self.inputs()).images
        for _ in range(2):
            pipe.enable_model_cpu_offload(device="cpu")
            assert torch.equal(pipe(**self.inputs()).images, expected)
        assert all(hasattr(part, "_hf_hook") for part in (pipe.transformer, pipe.guidance_transformer, pipe.vae))

    @pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
    def test_group_offloading_inference(self, make_pipe, offload_type):
        expected = make_pipe()(**self.inputs()).images
        pipe = make_pipe()
        pipe.enable_group_offload(torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
        torch.testing.assert_close(pipe(**self.inputs()).images, expected)

    def test_group_offloading_of_two_transformers_to_one_folder_is_refused(self, make_flow_pipe, tmp_path):
        weak, options = make_flow_pipe.weaker(), {"offload_type": "leaf_level"}
        expected = make_flow_pipe(guidance_transformer=weak)(**self.inputs()).images
        pipe = make_flow_pipe(guidance_transformer=weak)
        with pytest.raises(UserError, match=r"overwrite each other's files; call enable_group_offload on each model"):
            pipe.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path / "both"), **options)
        for name, part in {"transformer": pipe.transformer, "guidance_transformer": weak, "vae": pipe.vae}.items():
            part.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path / name), **options)
        torch.testing.assert_close(pipe(**self.inputs()).images, expected)

    def test_group_offloading_to_disk_without_the_second_transformer(self, make_flow_pipe, tmp_path):
        expected = make_flow_pipe(guidance_transformer=make_flow_pipe.weaker())(**self.inputs()).images
        pipe = make_flow_pipe(guidance_transformer=make_flow_pipe.weaker())
        pipe.enable_group_offload(
            torch.device("cpu"),
            offload_type="leaf_level",
            offload_to_disk_path=str(tmp_path),
            exclude_modules="guidance_transformer",
        )
        torch.testing.assert_close(pipe(**self.inputs()).images, expected)

    def test_layerwise_casting_inference(self, make_pipe, tmp_path):
        make_pipe().save_pretrained(tmp_path)
        pipe = self.pipeline_class.from_pretrained(tmp_path, dtype=torch.bfloat16)
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        assert torch.isfinite(pipe(**self.inputs()).images).all()

    def test_from_pipe(self, make_pipe):
        defaults = {"num_inference_steps": 3}
        pipe = make_pipe(sampling_defaults=defaults)
        other = self.pipeline_class.from_pipe(pipe, guidance_transformer=make_pipe.weaker())
        assert other.transformer is pipe.transformer and other.vae is pipe.vae
        assert other.config["sampling_defaults"] == defaults and other.guidance_transformer is not None

    def test_xformers_fails_early_where_it_cannot_run(self, make_pipe):
        pipe = make_pipe()
        if torch.cuda.is_available():
            pytest.skip("xformers may run here")
        with pytest.raises((ValueError, ModuleNotFoundError)):
            pipe.enable_xformers_memory_efficient_attention()
        pipe.disable_xformers_memory_efficient_attention()
        assert torch.isfinite(pipe(**self.inputs()).images).all()

    def test_progress_bar(self, make_pipe, capsys):
        pipe = make_pipe()
        pipe.set_progress_bar_config(disable=False)
        pipe(**self.inputs())
        assert "2/2" in capsys.readouterr().err


class TestCaches:
    """Every cache of diffusers runs through the pipeline and leaves no state behind. Inherited likewise."""

    inputs = staticmethod(inputs)

    @staticmethod
    def two(number):
        """Conditions of two images, of which the second depends on the number."""
        return {"class_labels": [1, 2 * number]}

    # diffusers' FasterCache calls torch.meshgrid without `indexing`.
    @pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
    @pytest.mark.parametrize("name", ["first_block", "taylorseer", "taylorseer_lite", "mag", "pyramid", "faster"])
    def test_cache_inference(self, make_pipe, name):
        self.check_inference(make_pipe(), name)

    def check_inference(self, pipe, name):
        call = {"num_inference_steps": 4, "guidance_interval": (0.2, 0.9)}
        expected = pipe(**self.inputs(**call)).images
        pipe.transformer.enable_cache(self.config(name, pipe))
        cached = pipe(**self.inputs(**call)).images
        torch.testing.assert_close(cached, expected, rtol=0, atol=0.2)
        torch.testing.assert_close(pipe(**self.inputs(**call)).images, cached)
        pipe.transformer.disable_cache()
        torch.testing.assert_close(pipe(**self.inputs(**call)).images, expected, rtol=0, atol=1e-5)

    @pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
    @pytest.mark.parametrize(("name", "call"), [("pyramid", {"guidance_interval": (0.0, 0.7)}), ("faster", {})])
    def test_state_advances_with_the_steps_and_is_reset(self, make_pipe, name, call):
        """As diffusers' own check: one iteration of every hook per step, guided or not, none left afterwards."""
        pipe = make_pipe()
        pipe.transformer.enable_cache(self.config(name, pipe))
        registries = [m._diffusers_hook for m in pipe.transformer.modules() if hasattr(m, "_diffusers_hook")]
        hooks = [hook for registry in registries for hook in registry.hooks.values() if hasattr(hook, "state")]
        steps = []

        def look(pipeline, index, timestep, tensors):
            steps.append([(hook.state.iteration, getattr(hook.state, "cache", "none") is not None) for hook in hooks])
            return tensors

        pipe(**self.inputs(callback_on_step_end=look, **call))
        assert len(hooks) >= 2 and steps == [[(1, True)] * len(hooks), [(2, True)] * len(hooks)]
        for hook in hooks:
            names = ("cache", "batch_size", "low_frequency_delta", "high_frequency_delta")
            left = [getattr(hook.state, name, None) for name in names]
            assert hook.state.iteration == 0 and left == [None] * len(names)

    @pytest.mark.parametrize("cached", ["transformer", "guidance_transformer"])
    def test_faster_cache_is_refused_without_classifier_free_guidance(self, make_flow_pipe, cached):
        pipe = make_flow_pipe(guidance_transformer=make_flow_pipe.weaker())
        getattr(pipe, cached).enable_cache(self.config("faster", pipe))
        for call in ({}, {"guidance_method": "cfg", "guidance_scale": 1.0}):
            with pytest.raises(UserError, match=f"the {cached} has FasterCache, which needs classifier-free guidance"):
                pipe(**self.inputs(**call))

    @pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
    def test_faster_cache_keeps_images_apart_when_a_callback_ends_the_guidance(self, make_flow_pipe):
        pipe = make_flow_pipe()
        pipe.transformer.enable_cache(self.config("faster", pipe))

        def cut_off(pipeline, index, timestep, tensors):
            pipeline._guidance_scale = 0.0
            return tensors

        def first_image(other):
            call = {"num_inference_steps": 4, "callback_on_step_end": cut_off, "generator": [seeded(0), seeded(1)]}
            return pipe(**self.inputs(**other, **call)).images[0]

        torch.testing.assert_close(first_image(self.two(0)), first_image(self.two(1)), rtol=0, atol=1e-5)

    @staticmethod
    def config(name, pipe):
        import diffusers

        if name == "first_block":
            return diffusers.FirstBlockCacheConfig(threshold=0.1)
        if name.startswith("taylorseer"):
            return diffusers.TaylorSeerCacheConfig(
                cache_interval=2, disable_cache_before_step=1, max_order=1, use_lite_mode=name.endswith("lite")
            )
        if name == "mag":
            return diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4))
        attention = {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_block_identifiers": ("blocks",),
            "current_timestep_callback": lambda: pipe.current_timestep,
        }
        if name == "pyramid":
            return diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_timestep_skip_range=(100, 800), **attention
            )
        return diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 901),
            unconditional_batch_skip_range=2,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
            **attention,
        )


@pytest.mark.parametrize("name", ["first_block", "taylorseer", "taylorseer_lite", "mag", "pyramid", "faster"])
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_cache_inference_of_loops(name):
    TestCaches().check_inference(PipelineMaker(ELTTransformer2DModel)(), name)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.parametrize("name", ["pyramid", "faster"])
def test_state_of_loops_advances_with_the_steps_and_is_reset(name):
    TestCaches().test_state_advances_with_the_steps_and_is_reset(PipelineMaker(ELTTransformer2DModel), name, {})


class TestSampling:
    def test_loop_equals_euler_by_hand(self, make_flow_pipe):
        pipe = make_flow_pipe()
        start = torch.randn(2, CHANNELS, SIDE, SIDE, generator=seeded())
        labels, null = torch.tensor([0, 3]), torch.tensor([NUM_CLASSES, NUM_CLASSES])
        call = {"num_inference_steps": 4, "latents": start, "output_type": "latent", "guidance_interval": (0.3, 0.9)}
        found = pipe(**inputs(class_labels=labels, guidance_scale=3.0, **call)).images

        u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        grid = 2 * u / (1 + u)  # shift 2
        x = start
        with torch.no_grad():
            for t, t_next in itertools.pairwise(grid):
                v = pipe.transformer(x, t.expand(2), labels).sample
                if 0.3 <= t <= 0.9:
                    v_null = pipe.transformer(x, t.expand(2), null).sample
                    v = v_null + 3.0 * (v - v_null)
                x = x + (t_next - t) * v
        torch.testing.assert_close(found, x, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("prediction_type", ["velocity", "sample", "epsilon"])
    def test_predictions_are_converted(self, prediction_type):
        pipe = tiny_pipeline(transformer=tiny_transformer(prediction_type=prediction_type))
        sigmas = [0.9, 0.4]
        start = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        found = pipe(**inputs(latents=start, sigmas=sigmas, guidance_scale=1.0, output_type="latent")).images
        x, grid = start, [2 * s / (1 + s) for s in sigmas] + [0.0]
        with torch.no_grad():
            for t, t_next in itertools.pairwise(grid):
                out = pipe.transformer(x, torch.tensor([t]), torch.tensor([1])).sample
                v = {"velocity": out, "sample": (x - out) / t, "epsilon": (out - x) / (1 - t)}[prediction_type]
                x = x + (t_next - t) * v
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)

    def test_autoguidance_extrapolates_from_the_weak_model(self, make_flow_pipe):
        weak = make_flow_pipe.weaker()
        pipe = make_flow_pipe(guidance_transformer=weak)
        start = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        call = inputs(latents=start, num_inference_steps=1, guidance_scale=1.5, output_type="latent")
        with torch.no_grad():
            strong_v = pipe.transformer(start, torch.ones(1), torch.tensor([1])).sample
            weak_v = weak(start, torch.ones(1), torch.tensor([1])).sample
        torch.testing.assert_close(pipe(**call).images, start - (weak_v + 1.5 * (strong_v - weak_v)))

    def test_latent_output_decodes_to_the_images(self, make_pipe):
        pipe = make_pipe()
        latents = pipe(**inputs(output_type="latent")).images
        with torch.no_grad():
            images = pipe.vae.decode(latents).sample.clamp(0, 1)
        torch.testing.assert_close(pipe(**inputs()).images, images)

    def test_output_types_agree(self, make_pipe):
        pipe = make_pipe()
        tensor = pipe(**inputs()).images
        array = pipe(**inputs(output_type="np")).images
        (picture,) = pipe(**inputs(output_type="pil")).images
        assert isinstance(picture, Image.Image)
        np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy())
        np.testing.assert_array_equal(np.asarray(picture), (array[0] * 255).round().astype(np.uint8))

    def test_the_encoder_is_never_used(self, make_pipe, monkeypatch):
        pipe = make_pipe()
        monkeypatch.setattr(type(pipe.vae), "encoder", property(lambda self: pytest.fail("the encoder was asked for")))
        pipe(**inputs())

    def test_unconditional_model(self):
        pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=0, class_dropout_prob=0.0))
        call = inputs(class_labels=None, guidance_scale=1.0)
        assert pipe(**call, num_images_per_prompt=3).images.shape[0] == 3
        per_image = pipe(**{**call, "generator": [seeded(0), seeded(1)]}).images
        assert per_image.shape[0] == 2
        torch.testing.assert_close(per_image[1:], pipe(**{**call, "generator": seeded(1)}).images)

    def test_autoencoder_kl(self):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=CHANNELS,
            down_block_types=2 * ("DownEncoderBlock2D",), up_block_types=2 * ("UpDecoderBlock2D",),
        )  # fmt: skip
        images = tiny_pipeline(vae=vae)(**inputs()).images
        assert images.shape == (1, 3, 2 * SIDE, 2 * SIDE) and images.min() >= 0 and images.max() <= 1

    def test_pixels_as_latents(self, tmp_path):
        transformer = tiny_transformer(in_channels=3, sample_size=8, prediction_type="sample")
        pipe = tiny_pipeline(vae=PixelAutoencoder(image_size=8), transformer=transformer)
        latents = pipe(**inputs(output_type="latent")).images
        images = pipe(**inputs()).images
        torch.testing.assert_close(images, pipe.vae.decode(latents).sample.clamp(0, 1))
        pipe.save_pretrained(tmp_path)
        assert torch.equal(ClassToImagePipeline.from_pretrained(tmp_path)(**inputs()).images, images)

    def test_svg_autoencoder(self):
        vae = SVGAutoencoder(
            encoder_channels=CHANNELS - 2, residual_channels=2, latent_size=SIDE, residual_hidden_size=8,
            residual_num_layers=1, residual_num_heads=1, residual_intermediate_size=8, decoder_layers_per_block=1,
            decoder_up_block_types=2 * ["UpDecoderBlock2D"], decoder_block_out_channels=(8, 8), norm_num_groups=4,
        )  # fmt: skip
        images = tiny_pipeline(vae=vae.eval())(**inputs()).images
        assert images.shape == (1, 3, SIDE * vae.patch_size, SIDE * vae.patch_size)

    def test_autoencoder_rae(self):
        torch.manual_seed(0)
        width = 64  # diffusers gives its encoder heads of 64 channels
        vae = AutoencoderRAE(
            encoder_type="mae", encoder_hidden_size=width, encoder_patch_size=PATCH, encoder_num_hidden_layers=1,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=32, patch_size=PATCH, encoder_input_size=SIDE * PATCH,
        )  # fmt: skip
        images = tiny_pipeline(vae=vae, transformer=tiny_transformer(in_channels=width))(**inputs()).images
        assert images.shape == (1, *OUTPUT_SHAPE) and images.min() >= 0 and images.max() <= 1

    def test_compiled_transformer(self, tmp_path):
        pipe = tiny_pipeline()
        expected = pipe(**inputs()).images
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        torch.testing.assert_close(pipe(**inputs()).images, expected)
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["transformer"] == ["repagen", "SiTTransformer2DModel"]

    def test_attention_kwargs_reach_the_transformer(self, make_pipe):
        pipe = make_pipe()
        seen = []
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_kwargs"]), with_kwargs=True
        )
        pipe(**inputs(attention_kwargs={"scale": 0.5}))
        assert seen and all(kwargs["scale"] == 0.5 for kwargs in seen)

    def test_sde_noise_is_per_image_with_a_list_of_generators(self, make_flow_pipe):
        scheduler, _ = sampler_preset("repa-sde")
        pipe = make_flow_pipe(scheduler=scheduler)
        call = {"num_inference_steps": 4}
        together = pipe(**inputs(class_labels=[1, 1], generator=[seeded(3), seeded(4)], **call)).images
        alone = pipe(**inputs(generator=seeded(4), **call)).images
        torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)


class TestEconomy:
    """Evaluations are counted at the models: none is wasted."""

    @staticmethod
    def count(pipe, **call):
        calls = {"strong": 0, "weak": 0}

        def counter(name):
            def hook(module, args, kwargs, output):
                calls[name] += len(kwargs["hidden_states"])

            return hook

        hooks = [pipe.transformer.register_forward_hook(counter("strong"), with_kwargs=True)]
        if pipe.guidance_transformer is not None:
            hooks.append(pipe.guidance_transformer.register_forward_hook(counter("weak"), with_kwargs=True))
        pipe(**inputs(**call))
        for hook in hooks:
            hook.remove()
        return calls["strong"] if pipe.guidance_transformer is None else (calls["strong"], calls["weak"])

    @pytest.mark.parametrize(
        ("preset", "steps", "forwards"),
        [("repa-ode", 10, 10), ("rae-euler", 50, 49), ("repa-heun", 10, 19), ("repa-sde", 10, 10)],
    )
    def test_unguided(self, preset, steps, forwards):
        pipe = tiny_pipeline(scheduler=sampler_preset(preset)[0])
        assert self.count(pipe, num_inference_steps=steps, guidance_scale=1.0) == forwards

    def test_cfg_doubles(self, make_pipe):
        assert self.count(make_pipe(), num_inference_steps=10) == 20

    def test_cfg_with_interval(self):
        pipe = tiny_pipeline(scheduler=sampler_preset("repa-ode")[0])
        # t = 1, 0.9 ... 0.1, of which 0.3 to 0.7 lie inside, both ends included
        assert self.count(pipe, num_inference_steps=10, guidance_interval=(0.3, 0.7)) == 10 + 5

    def test_autoguidance(self, make_pipe):
        pipe = make_pipe(guidance_transformer=make_pipe.weaker())
        assert self.count(pipe, num_inference_steps=10) == (10, 10)
        assert self.count(pipe, num_inference_steps=10, guidance_scale=1.0) == (10, 0)


class TestClassLabels:
    @pytest.mark.parametrize(
        "labels",
        [[2, 1], ["Crane", "golden retriever"], [[2], [1]], torch.tensor([[2], [1]]), np.array([2, 1]).tolist(),
         ("crane", 1), [np.int64(2), torch.tensor(1)]],
    )  # fmt: skip
    def test_forms_of_the_same_labels(self, labels):
        pipe = tiny_pipeline(id2label=ID2LABEL)
        expected = pipe(**inputs(class_labels=[2, 1])).images
        assert torch.equal(pipe(**inputs(class_labels=labels)).images, expected)

    def test_images_of_one_label_are_neighbours(self, make_pipe):
        pipe = make_pipe()
        seen = []
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
        )
        pipe(**inputs(class_labels=[2, 0], guidance_scale=1.0), num_images_per_prompt=2)
        assert seen[0] == [2, 2, 0, 0]

    def test_synonyms(self):
        pipe = tiny_pipeline(id2label=ID2LABEL)
        for name in ("TABBY", "tabby cat", "tabby, tabby cat"):
            assert torch.equal(pipe(**inputs(class_labels=name)).images, pipe(**inputs(class_labels=0)).images)

    def test_id2label_round_trip(self, tmp_path):
        pipe = tiny_pipeline(id2label={int(key): name for key, name in ID2LABEL.items()})
        pipe.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["id2label"] == ID2LABEL
        loaded = ClassToImagePipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(loaded(**inputs(class_labels="forklift")).images, pipe(**inputs(class_labels=3)).images)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (4, "class 4; this model's classes are 0 to 3"),
            (-1, "class -1; this model's classes are 0 to 3"),
            ([0, [1, 1000]], "class 1000"),
            ("goldn retreiver", "near names: golden retriever"),
            (1.5, "1.5 of type float"),
            (torch.tensor([1.0]), "tensor of torch.float32"),
            ([], "class_labels is empty"),
            (None, "class_labels is missing; give ids from 0 to 3"),
        ],
    )
    def test_wrong_labels_are_named_in_one_line(self, labels, message):
        with pytest.raises(UserError, match=message) as error:
            tiny_pipeline(id2label=ID2LABEL)(**inputs(class_labels=labels))
        assert "\n" not in str(error.value)

    def test_ambiguous_synonym(self):
        id2label = {"0": "crane, bird", "1": "crane, machine"}
        with pytest.raises(UserError, match=r"'crane', which names the classes \[0, 1\]"):
            tiny_pipeline(id2label=id2label)(**inputs(class_labels="crane"))

    def test_names_need_id2label(self):
        with pytest.raises(UserError, match="this pipeline has no id2label"):
            tiny_pipeline()(**inputs(class_labels="crane"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents has shape \(1, 3, 4, 4\); this call takes \(1, 8, 4, 4\)"),
        ({"output_type": "jpg"}, "'jpg'; allowed: pil, np, pt, latent"),
        ({"guidance_interval": (0.9, 0.1)}, "0 <= low <= high <= 1"),
        ({"generator": [seeded(0), seeded(1)]}, "list of 2 for 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds; allowed: latents"),
        ({"num_images_per_prompt": 0}, "give a whole number, at least 1"),
        ({"num_inference_steps": 0}, "give a whole number, at least 1"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        tiny_pipeline()(**inputs(**call))
    assert "\n" not in str(error.value)


def test_a_scheduler_without_explicit_times_is_refused():
    with pytest.raises(UserError, match="DDIMScheduler takes no explicit grid"):
        tiny_pipeline(scheduler=DDIMScheduler())(**inputs())


def test_guidance_needs_a_null_class_or_a_second_model():
    pipe = tiny_pipeline(transformer=tiny_transformer(class_dropout_prob=0.0))
    with pytest.raises(UserError, match="without a null class"):
        pipe(**inputs())
    pipe.guidance_transformer = tiny_transformer(seed=5)
    pipe(**inputs())


def test_guidance_transformer_must_speak_the_same_latents():
    pipe = tiny_pipeline(guidance_transformer=tiny_transformer(in_channels=4))
    with pytest.raises(UserError, match="guidance_transformer has in_channels 4, the transformer 8"):
        pipe(**inputs())


def test_autoencoder_must_speak_the_same_latents():
    with pytest.raises(UserError, match=r"samples, \(8, 2, 2\): .* 2 x 2 .* no other grid than 4 x 4"):
        tiny_pipeline(transformer=tiny_transformer(sample_size=2))(**inputs())


def test_labels_for_an_unconditional_model_are_refused():
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=0, class_dropout_prob=0.0))
    with pytest.raises(UserError, match="unconditional model"):
        pipe(**inputs(class_labels=0, guidance_scale=1.0))


def test_loading_and_calling_warn_of_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny_pipeline(id2label=ID2LABEL).save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded(**inputs())
    assert not caplog.records
    assert type(loaded) is ClassToImagePipeline and type(loaded.transformer) is SiTTransformer2DModel

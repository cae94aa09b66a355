"""Prompts in, pictures out: what diffusers' own pipeline tests check, guidance, sizes, interpolation and refusals."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
import test_class_to_image as of_classes
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from encoders.tiny_text_encoders import save_tiny
from tiny_pipelines import (
    CHANNELS,
    PATCH,
    SIDE,
    TEXT_DIM,
    TEXT_GENERATORS,
    TEXT_LENGTH,
    TextPipelineMaker,
    any_size_autoencoder,
    text_inputs,
    tiny_pipeline,
    tiny_text_components,
    tiny_text_encoder,
    tiny_text_pipeline,
    tiny_text_transformer,
    tiny_transformer,
)

from repagen import (
    ClassToImagePipeline,
    DiTDHTransformer2DModel,
    RAEv2Transformer2DModel,
    TextEncoder,
    TextToImagePipeline,
    UserError,
)
from repagen.pipelines.provenance import pipeline_sha256

EMBEDS = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(pipe: TextToImagePipeline, **overrides) -> torch.Tensor:
    return pipe(**text_inputs(**overrides)).images


def latents(pipe: TextToImagePipeline, **overrides) -> torch.Tensor:
    return images(pipe, output_type="latent", **overrides)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Up to rounding: weights that are mapped from a file lie at other addresses, on which matrix products depend."""
    return torch.allclose(first, second, rtol=0, atol=1e-6)


@pytest.fixture
def make_pipe() -> TextPipelineMaker:
    return TextPipelineMaker(DiTDHTransformer2DModel)


@pytest.fixture
def make_flow_pipe(make_pipe) -> TextPipelineMaker:
    return make_pipe


@pytest.fixture(params=TEXT_GENERATORS, ids=lambda cls: cls.__name__.removesuffix("Transformer2DModel"))
def pipe(request) -> TextToImagePipeline:
    return tiny_text_pipeline(request.param)


class TestDiffusersChecks(of_classes.TestDiffusersChecks):
    pipeline_class = TextToImagePipeline
    conditions = frozenset({"prompt", "negative_prompt", "height", "width", "prompt_embeds", "negative_prompt_embeds"})
    files = 10
    inputs = staticmethod(text_inputs)
    components = staticmethod(tiny_text_components)
    same = staticmethod(same)

    @staticmethod
    def batch(count):
        """As diffusers' test makes one: prompts of different lengths, the last very long."""
        prompt = text_inputs()["prompt"]
        return {"prompt": [prompt[: len(prompt) // number] for number in range(1, count)] + [100 * "very long"]}

    def test_inference_batch_single_identical(self, make_pipe):
        pipe = make_pipe()
        batch = images(pipe, **self.batch(3), generator=[seeded(i) for i in range(3)])
        torch.testing.assert_close(batch[:1], images(pipe), rtol=0, atol=1e-5)

    def test_encode_prompt_works_in_isolation(self, make_pipe):
        components = tiny_text_components()
        text = {name: part if "text" in name else None for name, part in components.items()}
        rest = {name: None if "text" in name else part for name, part in components.items()}
        visitor = ReturnNameVisitor()
        visitor.visit(visitor.get_ast_tree(cls=TextToImagePipeline))
        assert visitor.return_names == list(EMBEDS)
        call = text_inputs()
        encoded = TextToImagePipeline(**text).to("cpu").encode_prompt(call.pop("prompt"))
        without = TextToImagePipeline(**rest)
        without.set_progress_bar_config(disable=True)
        found = without(**call, **dict(zip(visitor.return_names, encoded, strict=True))).images
        assert torch.equal(found, images(make_pipe()))


class TestCaches(of_classes.TestCaches):
    inputs = staticmethod(text_inputs)

    @staticmethod
    def two(number):
        return {"prompt": ["a red cube", ["a blue ball", "yellow"][number]]}


class TestPrompts:
    def test_decide_the_picture(self, pipe):
        first, second = images(pipe), images(pipe, prompt="two blue balls")
        assert not torch.allclose(first, second, atol=1e-4)
        assert torch.equal(first, images(pipe))

    def test_forms_of_the_same_prompt(self, pipe):
        expected = images(pipe)
        assert torch.equal(images(pipe, prompt=["a red cube"]), expected)
        encoded = dict(zip(EMBEDS, pipe.encode_prompt("a red cube"), strict=True))
        assert torch.equal(images(pipe, prompt=None, **encoded), expected)
        only_asked = {name: encoded[name] for name in EMBEDS[:2]}
        assert torch.equal(images(pipe, prompt=None, **only_asked), expected)

    def test_embeddings_without_a_mask_are_all_real(self, pipe):
        embeds, mask, *_ = pipe.encode_prompt("a red cube")
        real = embeds[:, : int(mask.sum())]
        torch.testing.assert_close(images(pipe, prompt=None, prompt_embeds=real), images(pipe), rtol=0, atol=1e-5)

    def test_a_row_does_not_depend_on_its_batch(self, pipe):
        prompts = ["a red cube", "", "mixed languages: ein roter Würfel, красный куб, 赤い立方体", 500 * "word "]
        together = images(pipe, prompt=prompts, generator=[seeded(i) for i in range(4)])
        for index, prompt in enumerate(prompts):
            alone = images(pipe, prompt=prompt, generator=seeded(index))
            torch.testing.assert_close(together[index : index + 1], alone, rtol=0, atol=1e-5)

    def test_images_of_one_prompt_are_neighbours(self, pipe):
        embeds = pipe.encode_prompt(["a", "b"], num_images_per_prompt=2)[0]
        assert torch.equal(embeds[0], embeds[1]) and torch.equal(embeds[2], embeds[3])
        assert not torch.equal(embeds[1], embeds[2])

    def test_encode_prompt_reads_as_the_text_encoder(self, pipe):
        embeds, mask, null, null_mask = pipe.encode_prompt(["a red cube", "b"], negative_prompt="")
        expected = tiny_text_encoder().encode(["a red cube", "b", ""])
        assert embeds.shape == (2, TEXT_LENGTH, TEXT_DIM)
        assert torch.equal(torch.cat([embeds, null[:1]]), expected.embeddings)
        assert torch.equal(torch.cat([mask, null_mask[:1]]), expected.mask) and torch.equal(null[0], null[1])
        assert pipe.encode_prompt("b", do_classifier_free_guidance=False)[2:] == (None, None)

    def test_prompts_of_other_lengths_are_filled_up(self, pipe):
        short = torch.randn(1, 3, TEXT_DIM, generator=seeded())
        embeds, _, null, null_mask = pipe.encode_prompt("a red cube", negative_prompt_embeds=short)
        assert null.shape == embeds.shape and null_mask.sum() == 3 and torch.equal(null[:, :3], short)

    def test_callback_replaces_embeddings(self, pipe):
        other = pipe.encode_prompt("two blue balls")

        def swap(pipeline, index, timestep, tensors):
            assert set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
            return {"prompt_embeds": 2 * other[0]} if index == 0 else {}

        names = pipe._callback_tensor_inputs
        changed = images(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
        assert not torch.allclose(changed, images(pipe), atol=1e-5)
        unguided = images(
            pipe, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=names[:1], guidance_scale=1.0
        )
        assert torch.equal(unguided, images(pipe, guidance_scale=1.0))


class TestGuidance:
    @pytest.mark.parametrize("cls", TEXT_GENERATORS)
    def test_loop_equals_euler_by_hand(self, cls):
        pipe = tiny_text_pipeline(transformer=tiny_text_transformer(cls, prediction_type="velocity"))
        start = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        call = {"num_inference_steps": 4, "guidance_interval": (0.3, 0.9), "guidance_scale": 3.0}
        found = latents(pipe, latents=start, negative_prompt="blue", **call)
        encoded = tiny_text_encoder().encode(["a red cube", "blue"])
        conditions = [
            {"encoder_hidden_states": encoded.embeddings[i : i + 1], "encoder_attention_mask": encoded.mask[i : i + 1]}
            for i in range(2)
        ]
        u = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        x = start
        with torch.no_grad():
            for t, t_next in itertools.pairwise(2 * u / (1 + u)):
                v, weak = (pipe.transformer(x, t[None], **condition).sample for condition in conditions)
                x = x + (t_next - t) * (weak + 3.0 * (v - weak) if 0.3 <= t <= 0.9 else v)
        torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)

    def test_learned_null_is_a_mask_of_nothing(self, pipe):
        seen = []
        pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_attention_mask"]), with_kwargs=True
        )
        images(pipe, num_inference_steps=1)
        assert [bool(mask.any()) for mask in seen] == [True, False]

    def test_empty_null_is_the_empty_text(self, pipe, tmp_path):
        other = TextToImagePipeline(**pipe.components, null_prompt="empty")
        other.set_progress_bar_config(disable=True)
        assert torch.equal(images(other), images(pipe, negative_prompt=""))
        assert not torch.allclose(images(other), images(pipe), atol=1e-6)
        other.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "model_index.json").read_text())["null_prompt"] == "empty"

    def test_no_evaluation_is_wasted(self, pipe):
        def count(**call):
            calls = []
            hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
            images(pipe, num_inference_steps=10, **call)
            hook.remove()
            return len(calls)

        assert count(guidance_scale=1.0) == 10
        assert count() == 20
        times = [2 * u / (1 + u) for u in (1 - torch.arange(10) / 10).tolist()]
        assert count(guidance_interval=(0.3, 0.7)) == 10 + sum(0.3 <= t <= 0.7 for t in times)
        assert count(interpolate_to="b", guidance_scale=1.0) == 20
        assert count(interpolate_to="b") == 30
        assert count(interpolate_to="b", interpolation=0.0) == 20

    def test_internal_guidance_costs_one_evaluation(self):
        pipe = tiny_text_pipeline(RAEv2Transformer2DModel)
        start = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        found = latents(pipe, latents=start, num_inference_steps=1, guidance_method="internal")
        encoded = tiny_text_encoder().encode(["a red cube"])
        with torch.no_grad():
            strong, weak = pipe.transformer(
                start, torch.ones(1), encoder_hidden_states=encoded.embeddings,
                encoder_attention_mask=encoded.mask, return_base=True, return_dict=False,
            )[:2]  # fmt: skip
        guided = weak + 2.0 * (strong - weak)
        expected = guided if pipe.transformer.config.prediction_type == "sample" else start - guided
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_autoguidance(self, pipe):
        weak = tiny_text_transformer(type(pipe.transformer), seed=5)
        start = torch.randn(1, CHANNELS, SIDE, SIDE, generator=seeded())
        alone = [
            latents(tiny_text_pipeline(transformer=model), latents=start, num_inference_steps=1, guidance_scale=1.0)
            for model in (weak, pipe.transformer)
        ]
        pipe.register_modules(guidance_transformer=weak)
        found = latents(pipe, latents=start, num_inference_steps=1, guidance_scale=1.5)
        torch.testing.assert_close(found, alone[0] + 1.5 * (alone[1] - alone[0]), rtol=1e-4, atol=1e-4)

    def test_guidance_begun_by_a_callback_is_refused(self, pipe):
        def begin(pipeline, index, timestep, tensors):
            pipeline._guidance_scale = 2.0
            return {}

        with pytest.raises(UserError, match="raised above 1 by a callback"):
            images(pipe, guidance_scale=1.0, callback_on_step_end=begin)


class TestInterpolation:
    def test_ends_are_the_prompts(self, pipe):
        ends = [images(pipe), images(pipe, prompt="two blue balls")]
        for share, expected in enumerate(ends):
            assert torch.equal(images(pipe, interpolate_to="two blue balls", interpolation=float(share)), expected)
        both = images(
            pipe, interpolate_to="two blue balls", interpolation=[0.0, 1.0], num_images_per_prompt=2,
            generator=[seeded(), seeded()],
        )  # fmt: skip
        torch.testing.assert_close(both, torch.cat(ends), rtol=0, atol=1e-5)

    def test_mixes_velocities(self, pipe):
        call = {"num_inference_steps": 1, "guidance_scale": 1.0}
        first, second = latents(pipe, **call), latents(pipe, prompt="two blue balls", **call)
        mixed = latents(pipe, interpolate_to="two blue balls", interpolation=0.25, **call)
        torch.testing.assert_close(mixed, torch.lerp(first, second, 0.25), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", ["cfg", "internal"])
    def test_is_guided_as_the_prompts_are(self, method):
        pipe = tiny_text_pipeline(RAEv2Transformer2DModel)
        call = {"num_inference_steps": 1, "guidance_method": method}
        first, second = latents(pipe, **call), latents(pipe, prompt="two blue balls", **call)
        mixed = latents(pipe, interpolate_to="two blue balls", **call)
        torch.testing.assert_close(mixed, (first + second) / 2, rtol=1e-4, atol=1e-4)

    def test_under_a_cache(self, pipe):
        call = {"interpolate_to": "two blue balls", "num_inference_steps": 3}
        expected = latents(pipe, **call)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
        torch.testing.assert_close(latents(pipe, **call), expected, rtol=1e-4, atol=1e-4)

    def test_faster_cache_is_refused(self, pipe):
        pipe.transformer.enable_cache(TestCaches.config("faster", pipe))
        with pytest.raises(UserError, match="FasterCache, which splits a batch in two"):
            images(pipe, interpolate_to="b")


class TestSizes:
    @pytest.mark.parametrize(("height", "width"), [(8, 12), (12, 8), (8, 16), (18, 32)])
    def test_any_multiples(self, pipe, height, width):
        pipe.register_modules(vae=any_size_autoencoder())
        found = pipe(**text_inputs(output_type="pil"), height=height, width=width).images[0]
        assert found.size == (width, height)
        assert latents(pipe, height=height, width=width).shape == (1, CHANNELS, height // 2, width // 2)

    @pytest.mark.parametrize(("height", "width"), [(16, 24), (24, 16), (36, 64), (32, 32)])
    def test_any_multiples_in_representation_latents(self, height, width):
        pipe = tiny_text_pipeline()
        found = pipe(**text_inputs(output_type="pil"), height=height, width=width).images[0]
        assert found.size == (width, height)

    def test_default_is_that_of_the_training(self, pipe):
        side = SIDE * PATCH
        assert torch.equal(images(pipe, height=side, width=side), images(pipe))
        assert images(pipe).shape == (1, 3, side, side)

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ({"height": 9}, "height is 9; give a positive multiple of 2 px"),
            ({"width": 0}, "width is 0"),
            ({"width": 8.0}, "width is 8.0"),
        ],
    )
    def test_other_sizes_are_refused(self, pipe, size, message):
        pipe.register_modules(vae=any_size_autoencoder())
        with pytest.raises(UserError, match=message):
            images(pipe, **size)


class TestStorage:
    def test_diffusers_loads_it(self, tmp_path, caplog):
        pipe = tiny_text_pipeline()
        with caplog.at_level(logging.WARNING):
            pipe.save_pretrained(tmp_path)
            loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert not caplog.records and type(loaded) is TextToImagePipeline
        loaded.set_progress_bar_config(disable=True)
        assert same(images(loaded), images(pipe))

    def test_a_pipeline_without_text_encoder_is_saved_and_loaded(self, tmp_path):
        encoded = dict(zip(EMBEDS, tiny_text_pipeline().encode_prompt("a red cube"), strict=True))
        pipe = tiny_text_pipeline(text_encoder=None)
        expected = images(pipe, prompt=None, **encoded)
        pipe.save_pretrained(tmp_path)
        loaded = TextToImagePipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.text_encoder is None and same(images(loaded, prompt=None, **encoded), expected)
        text_encoder = tiny_text_encoder()
        assert TextToImagePipeline.from_pretrained(tmp_path, text_encoder=text_encoder).text_encoder is text_encoder

    def test_fingerprint_of_a_text_encoder_kept_by_reference(self, tmp_path):
        def referring(source, **reading):
            encoder = TextEncoder.from_encoder(source, max_length=20, **reading)
            encoder.save_pretrained(tmp_path / "reference", include_encoder=False)
            return tiny_text_pipeline(text_encoder=TextEncoder.from_pretrained(tmp_path / "reference"))

        pipe = referring(save_tiny(tmp_path / "t5", "t5"))
        before = pipeline_sha256(pipe)
        assert not list(pipe.text_encoder.parameters())  # nothing was fetched for it
        pipe(**text_inputs())
        assert list(pipe.text_encoder.parameters()) and pipeline_sha256(pipe) == before
        pipe.text_encoder.save_pretrained(tmp_path / "whole", include_encoder=True)
        whole = TextEncoder.from_pretrained(tmp_path / "whole")
        assert pipeline_sha256(tiny_text_pipeline(text_encoder=whole)) == before
        assert pipeline_sha256(referring(save_tiny(tmp_path / "elsewhere", "t5"))) == before
        others = [
            referring(tmp_path / "t5", hidden_layer=0),
            referring(save_tiny(tmp_path / "other", "t5", seed=1)),
            tiny_text_pipeline(text_encoder=whole.to(torch.bfloat16)),
            tiny_text_pipeline(text_encoder=None),
        ]
        assert len({before, *map(pipeline_sha256, others)}) == 5

    def test_pipelines_of_classes_and_of_prompts_are_told_apart(self, tmp_path):
        tiny_text_pipeline().save_pretrained(tmp_path)
        with pytest.raises(UserError, match="holds a TextToImagePipeline; a ClassToImagePipeline is needed"):
            ClassToImagePipeline.from_pretrained(tmp_path)

    def test_offload_runs_text_encoder_transformer_vae(self, make_pipe):
        pipe = make_pipe()
        expected = images(pipe)
        assert pipe.model_cpu_offload_seq == "text_encoder->transformer->vae"
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(images(pipe), expected)
        pipe.remove_all_hooks()


MASK = torch.ones(1, 5, dtype=torch.bool)


def embeddings(*shape: int) -> torch.Tensor:
    return torch.zeros(*(shape or (1, 5, TEXT_DIM)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": None}, "prompt is missing; give a text, a list of texts, or prompt_embeds"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": 3}, "prompt is '3' of type int; give a text"),
        ({"prompt": ["a", 3]}, "of type list; give a text, or a list"),
        ({"prompt_embeds": embeddings()}, "prompt and prompt_embeds are both given"),
        ({"prompt_embeds_mask": MASK}, "prompt_embeds_mask is given without prompt_embeds"),
        ({"prompt": None, "prompt_embeds": embeddings(1, 5)}, r"of shape \(1, 5\); give floats"),
        ({"prompt": None, "prompt_embeds": embeddings(1, 5, 7)}, "has width 7; this pipeline's transformer takes 32"),
        (
            {"prompt": None, "prompt_embeds": embeddings(), "prompt_embeds_mask": MASK[:, :4]},
            r"prompt_embeds_mask is torch.bool of shape \(1, 4\); give bool \(1, 5\)",
        ),
        ({"prompt": None, "prompt_embeds": embeddings(), "prompt_embeds_mask": MASK.long()}, "is torch.int64"),
        (
            {"negative_prompt": "b", "negative_prompt_embeds": embeddings()},
            "negative_prompt and negative_prompt_embeds",
        ),
        ({"negative_prompt_embeds_mask": MASK}, "negative_prompt_embeds_mask is given without"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 prompts for 1 of prompt"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents has shape \(1, 3, 4, 4\); this call takes \(1, 8, 4, 4\)"),
        ({"generator": [seeded(0), seeded(1)]}, "list of 2 for 1 images"),
        ({"output_type": "jpg"}, "'jpg'; allowed: pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["x"]}, "x; allowed: latents, prompt_embeds, negative_prompt_embeds"),
        ({"height": 22}, "height is 22; give a positive multiple of 4 px"),
        ({"height": 24.0}, "height is 24.0; give a positive multiple of 4 px"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5; give a whole number, at least 1"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt is True; give a whole number"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt is '2'; give a whole number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5; give a whole number, at least 1"),
        ({"guidance_interval": "ab"}, r"guidance_interval is 'ab'; give \(low, high\)"),
        ({"guidance_interval": (0, "b")}, r"guidance_interval is \(0, 'b'\); give"),
        ({"attention_kwargs": 3}, "attention_kwargs is 3; give a dict"),
        ({"generator": 5}, "generator has a int; give a torch.Generator, or a list"),
        ({"generator": (seeded(),)}, "generator has a tuple; give a torch.Generator"),
        ({"prompt": None, "prompt_embeds": [1, 2]}, "prompt_embeds is a list; give a tensor"),
        ({"sigmas": [0.5, 1.0]}, "sigmas run from 0.5 to 1; give falling times"),
        ({"strength": 0.5}, "strength is given without an image"),
        ({"mask_image": torch.zeros(4, 4)}, "mask_image is given without an image"),
        ({"interpolation": 0.5}, "interpolation is given without a second prompt"),
        ({"interpolate_to": "b", "interpolation": 1.5}, r"interpolation is 1.5; give a number in \[0, 1\]"),
        ({"interpolate_to": "b", "interpolation": [0.1, 0.2]}, "or one for each of 1 images"),
        ({"interpolate_to": ["b", "c"]}, "interpolate_to has 2 prompts for 1 of prompt"),
        ({"interpolate_to": 1}, "interpolate_to is '1' of type int"),
        ({"guidance_method": "internal"}, "has no base head"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        images(tiny_text_pipeline(), **call)
    assert "\n" not in str(error.value)


def test_a_size_may_be_a_number_of_numpy():
    pipe = tiny_text_pipeline()
    assert pipe.latent_grid(np.int64(16), np.int64(16)) == pipe.latent_grid(16, 16)


@pytest.mark.parametrize(
    ("components", "call", "message"),
    [
        ({"text_encoder": None}, {}, "the pipeline has no text_encoder; give prompt_embeds"),
        (
            {"text_encoder": None, "null_prompt": "empty"},
            {"prompt": None, "prompt_embeds": embeddings()},
            "negative_prompt_embeds is missing",
        ),
        ({"null_prompt": "none"}, {}, "null_prompt is 'none'; allowed: learned, empty"),
    ],
)
def test_what_the_text_encoder_must_do_is_named(components, call, message):
    with pytest.raises(UserError, match=message):
        images(tiny_text_pipeline(**components), **call)


def test_components_must_fit():
    with pytest.raises(UserError, match="takes no text; use ClassToImagePipeline"):
        images(tiny_text_pipeline(transformer=tiny_transformer()))
    with pytest.raises(UserError, match="has embeddings of width 32, the transformer takes 24"):
        images(tiny_text_pipeline(transformer=tiny_text_transformer(text_dim=24)))
    with pytest.raises(UserError, match="guidance_transformer has text_dim 24, the transformer 32"):
        images(tiny_text_pipeline(guidance_transformer=tiny_text_transformer(text_dim=24)))
    with pytest.raises(UserError, match="which a ClassToImagePipeline has not; use TextToImagePipeline"):
        tiny_pipeline(transformer=tiny_text_transformer())(num_inference_steps=1)


def test_guidance_needs_a_null_prompt():
    pipe = tiny_text_pipeline(transformer=tiny_text_transformer(text_dropout_prob=0.0))
    with pytest.raises(UserError, match=r"text_dropout_prob is 0\); give a negative_prompt"):
        images(pipe)
    with pytest.raises(UserError, match="give a negative_prompt"):
        pipe.check_options({"guidance_scale": 2.0})
    images(pipe, negative_prompt="blue")
    images(pipe, guidance_scale=1.0)

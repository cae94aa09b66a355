"""Image to image by partial noising, and repainting of tokens under a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_pipelines import (
    CHANNELS,
    any_size_autoencoder,
    text_inputs,
    tiny_text_pipeline,
)

from repagen import TextToImagePipeline, UserError, sampler_preset
from repagen.models.latents import images_to_latents
from repagen.pipelines.editing import check_frames, image_batch, token_mask

EDGE = 8  # px of the images, 4 x 4 tokens


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return tiny_text_pipeline(vae=any_size_autoencoder())


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.rand(3, EDGE, EDGE, generator=torch.Generator().manual_seed(7))


def drawn(pipe: TextToImagePipeline, **overrides) -> torch.Tensor:
    return pipe(**text_inputs(**overrides)).images


def encoded(pipe: TextToImagePipeline, image: torch.Tensor) -> torch.Tensor:
    return images_to_latents(pipe.vae, image[None], sample_posterior=False)


class TestStrength:
    def test_0_is_the_reconstruction(self, pipe, image):
        calls = []
        hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
        found = drawn(pipe, image=image, strength=0.0)
        hook.remove()
        with torch.no_grad():
            mode = pipe.vae.encode(image[None] * 2 - 1).latent_dist.mode()
            expected = (pipe.vae.decode(mode).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not calls and pipe.num_timesteps == 0
        assert torch.equal(drawn(pipe, image=image, strength=0.0, output_type="latent"), encoded(pipe, image))

    def test_1_is_text_to_image(self, pipe, image):
        assert torch.equal(drawn(pipe, image=image, strength=1.0), drawn(pipe))

    def test_begins_at_exactly_that_time(self, pipe, image):
        """One step from t = strength to 0, by hand."""
        noise, t = torch.randn(1, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1)), 0.1
        call = {"image": image, "latents": noise, "strength": t, "guidance_scale": 1.0, "num_inference_steps": 4}
        found = drawn(pipe, output_type="latent", **call)
        embeds, mask, *_ = pipe.encode_prompt("a red cube")
        x = (1 - t) * encoded(pipe, image) + t * noise
        with torch.no_grad():
            v = pipe.transformer(
                x, torch.tensor([t]), encoder_hidden_states=embeds, encoder_attention_mask=mask
            ).sample
        torch.testing.assert_close(found, x - t * v, rtol=1e-4, atol=1e-5)

    def test_grid_below_the_strength_stays(self, pipe, image):
        times = []

        def record(pipeline, index, timestep, tensors):
            times.append(float(timestep) / 1000)
            return {}

        drawn(pipe, num_inference_steps=10, callback_on_step_end=record)
        whole, times[:] = list(times), []
        drawn(pipe, image=image, strength=0.6, num_inference_steps=10, callback_on_step_end=record)
        assert times == pytest.approx([0.6, *(t for t in whole if t < 0.6)], abs=1e-5)

    @pytest.mark.parametrize("preset", ["repa-heun", "rae-euler", "repa-sde", "sit-ode"])
    def test_every_sampler(self, image, preset):
        pipe = tiny_text_pipeline(vae=any_size_autoencoder(), scheduler=sampler_preset(preset)[0])
        call = {"image": image, "num_inference_steps": 6, "output_type": "latent"}
        changes = [
            (drawn(pipe, strength=strength, **call) - encoded(pipe, image)).abs().mean()
            for strength in (0.0, 1e-4, 0.2, 0.9)
        ]
        assert changes[0] == 0 and changes[1] < 0.01 and changes[1] < changes[2] < changes[3]

    def test_default_keeps_a_part(self, pipe, image):
        assert torch.equal(drawn(pipe, image=image), drawn(pipe, image=image, strength=0.6))


class TestMask:
    def test_kept_tokens_are_those_of_the_image(self, pipe, image):
        mask = torch.zeros(EDGE, EDGE)
        mask[:, :3] = 1  # touches two of four columns
        for strength in (1.0, 0.5):
            call = {"image": image, "mask_image": mask, "strength": strength, "num_inference_steps": 5}
            found = drawn(pipe, output_type="latent", **call)
            kept = found == encoded(pipe, image)
            assert kept[..., 2:].all() and not kept[..., :2].any()

    def test_kept_tokens_are_noised_to_the_time_of_each_step(self, pipe, image):
        noise = torch.randn(1, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(1))
        clean, seen = encoded(pipe, image), []

        def record(module, args, kwargs):
            seen.append((float(kwargs["timestep"][0]), kwargs["hidden_states"]))

        hook = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
        drawn(pipe, image=image, mask_image=torch.zeros(EDGE, EDGE), latents=noise, num_inference_steps=4)
        hook.remove()
        assert len(seen) == 8
        for t, latents in seen:
            torch.testing.assert_close(latents, (1 - t) * clean + t * noise, rtol=0, atol=1e-5)

    def test_nothing_repainted_is_the_reconstruction(self, pipe, image):
        kept = drawn(pipe, image=image, mask_image=torch.zeros(EDGE, EDGE))
        assert torch.equal(kept, drawn(pipe, image=image, strength=0.0))

    def test_everything_repainted_is_text_to_image(self, pipe, image):
        assert torch.equal(drawn(pipe, image=image, mask_image=torch.ones(EDGE, EDGE)), drawn(pipe))

    @pytest.mark.parametrize("preset", ["repa-heun", "rae-euler"])
    def test_every_sampler_keeps(self, image, preset):
        pipe = tiny_text_pipeline(vae=any_size_autoencoder(), scheduler=sampler_preset(preset)[0])
        mask = torch.zeros(EDGE, EDGE)
        mask[:2, :2] = 1
        found = drawn(pipe, image=image, mask_image=mask, num_inference_steps=4, output_type="latent")
        kept = found == encoded(pipe, image)
        assert not kept[0, :, 0, 0].any() and kept.sum() == kept.numel() - CHANNELS

    def test_a_token_is_touched_by_one_pixel(self):
        mask = torch.zeros(1, 1, EDGE, EDGE)
        mask[0, 0, 3, 5] = 1
        assert token_mask(mask, (4, 4)).nonzero().tolist() == [[0, 0, 1, 2]]


class TestBatches:
    def test_one_image_for_all_prompts_or_one_each(self, pipe, image):
        other = image.flip(1)
        both = drawn(pipe, prompt=["a", "b"], image=[image, other], strength=0.0, num_images_per_prompt=2)
        expected = torch.cat([drawn(pipe, image=one, strength=0.0) for one in (image, image, other, other)])
        torch.testing.assert_close(both, expected, rtol=0, atol=1e-5)
        same = drawn(pipe, prompt=["a", "b"], image=image, strength=0.0)
        torch.testing.assert_close(same[0], same[1])
        with pytest.raises(UserError, match="image has 2 images for 1 prompts"):
            drawn(pipe, image=[image, other])

    def test_non_square(self, pipe):
        wide = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(3))
        found = drawn(pipe, image=wide, height=8, width=16, strength=0.0, output_type="latent")
        assert torch.equal(found, encoded(pipe, wide))

    def test_the_encoder_is_fetched_for_editing_alone(self, image, monkeypatch):
        monkeypatch.setattr(AutoencoderKL, "encode", lambda *_, **__: pytest.fail("encoded"))
        drawn(tiny_text_pipeline(vae=any_size_autoencoder()))


class TestImages:
    def test_forms_of_the_same_image(self):
        array = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8)
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        forms = [Image.fromarray(array), array, array[None], tensor, tensor.float() / 255, [tensor[None]]]
        batches = [image_batch(form, (EDGE, EDGE), "image", 3) for form in forms]
        for batch in batches:
            torch.testing.assert_close(batch, tensor[None] / 255)

    def test_masks_may_lack_channels(self):
        mask = np.zeros((EDGE, EDGE), dtype=bool)
        mask[0] = True
        forms = [mask, torch.from_numpy(mask), Image.fromarray(mask)]
        for form in forms:
            assert torch.equal(image_batch(form, (EDGE, EDGE), "m", 1)[0, 0] > 0.5, torch.from_numpy(mask))

    def test_scaled_to_cover_and_cropped_in_the_middle(self):
        wide = torch.zeros(3, 4, 12)
        wide[:, :, 4:8] = 1  # its middle third is white
        found = image_batch(wide, (8, 8), "image", 3)
        assert found.shape == (1, 3, 8, 8) and (found > 0.4).all() and found[..., 2:6].min() > 0.9

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            ("a.png", "image has a str; give PIL images, arrays or tensors"),
            (torch.rand(1, 4, 4), r"image has shape \(1, 4, 4\); give \(3, H, W\)"),
            (np.zeros((4, 4, 1)), r"image has shape \(4, 4, 1\); give \(H, W, 3\)"),
            (2 * torch.ones(3, 4, 4), "values outside"),
            (torch.ones(3, 4, 4, dtype=torch.long), "torch.int64"),
            ([], "image is an empty list"),
        ],
    )
    def test_wrong_ones_are_named(self, image, message):
        with pytest.raises(UserError, match=message):
            image_batch(image, (8, 8), "image", 3)

    def test_a_mask_lies_over_its_image(self, pipe, image):
        with pytest.raises(
            UserError, match="mask_image is 16 x 8 for an image of 8 x 8; give one of the image's size"
        ):
            drawn(pipe, image=torch.rand(3, 8, 8), mask_image=torch.zeros(8, 16))
        check_frames(torch.rand(2, 3, 33, 50), [torch.zeros(17, 25), torch.zeros(66, 100)])
        with pytest.raises(UserError, match="mask_image is 4 x 8 for an image of 8 x 8"):
            check_frames(torch.rand(2, 3, 8, 8), [torch.zeros(8, 8), torch.zeros(8, 4)])

    @pytest.mark.parametrize("strength", [1.5, "x"])
    def test_strength_out_of_range(self, pipe, image, strength):
        with pytest.raises(UserError, match=rf"strength is {strength!r}; give a number in \[0, 1\]"):
            drawn(pipe, image=image, strength=strength)

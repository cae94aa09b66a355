"""Text-conditional sampling in any latent space: prompts in, pictures out; and editing with the same parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.hooks import FasterCacheConfig
from diffusers.image_processor import VaeImageProcessor

from repagen.errors import UserError, naming
from repagen.flow.guidance import GuidanceMethod
from repagen.hub.card import LicenceFact
from repagen.hub.published import PublishedMixin
from repagen.models.latents import decoded_size, images_to_latents
from repagen.pipelines.components import Autoencoder, Scheduler, TextEncoder, Transformer
from repagen.pipelines.editing import Images, KnownImage, image_batch, lay_partial_grid, token_mask
from repagen.pipelines.guided_prediction import Condition, GuidedPrediction
from repagen.pipelines.latent_sampling import (
    LatentSamplingPipeline,
    SampledImages,
    StepCallback,
    check_generators,
    tensor_inputs_of,
)
from repagen.pipelines.prompts import NULL_PROMPTS, NullPrompt, PromptArgument, Prompts, as_many, of_one_length
from repagen.pipelines.sampling_options import SamplingOptions

_EDITING_STRENGTH = 0.6


class TextToImagePipelineOutput(SampledImages):
    """What `TextToImagePipeline` returns; see `SampledImages`."""


class TextToImagePipeline(LatentSamplingPipeline):
    """Samples latents for prompts by following a transformer's predictions, and decodes them; edits images likewise.

    The autoencoder's encoder is used for editing alone. Sampler state and times are float32 whatever the models'
    dtype.

    Args:
        transformer: predicts at (x_t, t, prompt); one that takes text.
        vae: decodes latents: an autoencoder of ours, or diffusers' `AutoencoderKL` or `AutoencoderRAE`.
        scheduler: walks the times from 1 (noise) to 0 (data); its config holds the time shift.
        text_encoder: reads prompts; None for a pipeline that is called with `prompt_embeds`.
        guidance_transformer: a weaker model of the same latents and embeddings, for autoguidance (2406.02507); where
            it is set, autoguidance is the method by default, else classifier-free guidance (2207.12598).
        sampling_defaults: what calls use for arguments that are not given, by the fields of `SamplingOptions`.
        null_prompt: what the null pass is asked for without a negative prompt; see `NullPrompt`.

    Raises:
        UserError: `sampling_defaults` with an unknown key or a value that no model takes, or an unknown `null_prompt`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _may_be_absent: ClassVar[tuple[str, ...]] = ("text_encoder",)
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    text_encoder: Any

    def __init__(
        self,
        transformer: Transformer,
        vae: Autoencoder,
        scheduler: Scheduler,
        text_encoder: TextEncoder,
        guidance_transformer: Transformer | None = None,
        sampling_defaults: dict[str, Any] | None = None,
        null_prompt: NullPrompt = "learned",
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            guidance_transformer=guidance_transformer,
        )
        SamplingOptions.resolve(sampling_defaults, {})
        if null_prompt not in NULL_PROMPTS:
            raise UserError(f"null_prompt is {null_prompt!r}; allowed: {', '.join(NULL_PROMPTS)}")
        self.register_to_config(sampling_defaults=sampling_defaults, null_prompt=null_prompt)
        self.image_processor = VaeImageProcessor(do_normalize=False)

    def part_licences(self) -> Sequence[LicenceFact]:
        """See `PublishedMixin.part_licences`: those of the autoencoder's and the text encoder's parts."""
        parts = [part for part in (self.vae, self.text_encoder) if isinstance(part, PublishedMixin)]
        return [fact for part in parts for fact in part.part_licences()]

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_channels: int | None = None,
        guidance_method: GuidanceMethod | None = None,
        zero_init_steps: int | None = None,
        image: Images | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        interpolate_to: Prompts | None = None,
        interpolation: float | Sequence[float] | None = None,
    ) -> TextToImagePipelineOutput | tuple[Any]:
        """Draw images of prompts, or edit images.

        Sampling options (steps, guidance) that are None are those of the pipeline's `sampling_defaults`; what these
        leave open is as in `SamplingOptions`: 50 steps, no guidance.

        Args:
            prompt: a text, or a list; in place of it `prompt_embeds`.
            negative_prompt: asked for in the null pass, one or one per prompt; None: as `null_prompt` says.
            height, width: of the images in pixels; by default the size of the training. Any multiples of the
                autoencoder's patch (times the transformer's), as far as the autoencoder decodes them.
            num_inference_steps: in the scheduler's counting (RAE's counts grid points, so one step fewer).
            guidance_scale: weak + scale (strong - weak); 1 or less leaves guidance and its evaluations out.
            guidance_interval: (low, high) in t, both ends included, t = 1 is noise; no weak pass outside.
            num_images_per_prompt: images per prompt, neighbours in the batch.
            generator: one for a stream over the batch, or a list with one per image.
            latents: start noise (B, C, h, w), standard normal, instead of drawing it.
            prompt_embeds: (prompts, L, text_dim), as `encode_prompt` returns them.
            prompt_embeds_mask: (prompts, L) bool, True for real tokens; None: all are.
            negative_prompt_embeds, negative_prompt_embeds_mask: likewise, for the null pass.
            sigmas: unshifted falling times in [0, 1] instead of the scheduler's own grid.
            output_type: "pil", "np", "pt" or "latent"; see `SampledImages`.
            return_dict: False returns a tuple.
            attention_kwargs: {"scale": factor} multiplies LoRA layers.
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; the tensors it
                returns by name replace those of the loop.
            callback_on_step_end_tensor_inputs: names of the tensors it gets, among `_callback_tensor_inputs`.
            guidance_channels: guide only the first so many channels of the latent.
            guidance_method: "cfg", "autoguidance" or "internal" (a base head's prediction is the weak one).
            zero_init_steps: first steps with velocity 0, where guidance is on.
            image: to edit: one, or one per prompt; scaled until it covers height and width, then cropped.
            strength: time t in [0, 1] to which the image is noised and sampling begins; 0 returns its reconstruction,
                1 is sampling without it. By default 0.6, with a mask 1.
            mask_image: what to repaint, white: the tokens it touches are drawn anew. The others keep the latents of
                the image exactly.
            interpolate_to: a second prompt, or one per prompt.
            interpolation: its share in [0, 1], one number or one per image; by default 1/2. What is interpolated is
                the prediction at every step, (1 - share) v(prompt) + share v(second), exact at both ends; prompts of
                different lengths have no tokens that belong together. Costs one more evaluation a step.

        Returns:
            The images, `TextToImagePipelineOutput` or a tuple with them.

        Raises:
            UserError: (a ValueError) an argument does not fit the models; it names the argument and what is allowed.
        """
        tensor_inputs = tensor_inputs_of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_channels": guidance_channels,
            "guidance_method": guidance_method,
            "zero_init_steps": zero_init_steps,
        }
        self.begin_call(given, attention_kwargs)
        null_given = negative_prompt is not None or negative_prompt_embeds is not None
        self.check_call(num_images_per_prompt, output_type, tensor_inputs, null_given=null_given)
        self._check_editing(image, strength, mask_image, interpolate_to, interpolation)
        grid = self.latent_grid(height, width)

        device = self._execution_device
        prompts = self.encode_prompt(
            prompt, negative_prompt, num_images_per_prompt, prompt_embeds, prompt_embeds_mask, negative_prompt_embeds,
            negative_prompt_embeds_mask, device, self.do_classifier_free_guidance,
        )  # fmt: skip
        batch_size = len(prompts[0])
        check_generators(generator, batch_size)
        shape = (batch_size, self.transformer.config.in_channels, *grid)
        noise = self.prepare_latents(shape, generator, latents, device)
        mixture = self._mixture(interpolation, batch_size, device) if interpolate_to is not None else None
        conditions, null_condition = self._conditions(prompts, interpolate_to, num_images_per_prompt, mixture, device)
        known = None if image is None else self.encode_image(image, mask_image, noise, num_images_per_prompt)
        if strength is None:
            strength = 1.0 if known is None or known.repainted is not None else _EDITING_STRENGTH
        has_steps = lay_partial_grid(self.scheduler, strength, self._options.num_inference_steps, sigmas, device)
        start = noise if known is None else known.at(self._start_time if has_steps else 0.0)
        if has_steps:
            mixed = mixture if len(conditions) > 1 else None
            predict = self.guided_prediction(conditions, null_condition, mixed)
            start = self.denoise([start], predict, generator, callback_on_step_end, tensor_inputs, known)
        else:
            self._num_timesteps = 0
        images = self.finish_call(start, output_type)
        return TextToImagePipelineOutput(images=images) if return_dict else (images,)

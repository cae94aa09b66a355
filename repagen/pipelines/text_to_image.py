"""Text-conditional sampling in any latent space: prompts in, pictures out; and editing with the same parts."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.hooks import FasterCacheConfig
from diffusers.image_processor import VaeImageProcessor

from repagen.encoders.text import TextEncoder
from repagen.errors import UserError
from repagen.flow.guidance import GuidanceMethod
from repagen.hub.published import PublishedMixin
from repagen.models.latents import decoded_size, images_to_latents
from repagen.pipelines.components import Autoencoder, Scheduler, Transformer
from repagen.pipelines.editing import Images, KnownImage, check_frames, image_batch, lay_partial_grid, token_mask
from repagen.pipelines.guided_prediction import Condition, GuidedPrediction
from repagen.pipelines.latent_sampling import (
    LatentSamplingPipeline,
    SampledImages,
    StepCallback,
    check_generators,
    tensor_inputs_of,
)
from repagen.pipelines.prompts import NULL_PROMPTS, PromptArgument, Prompts, as_many, of_one_length
from repagen.pipelines.sampling_options import SamplingOptions, is_number

if TYPE_CHECKING:
    from repagen.hub.card import LicenceFact

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
        null_prompt: what the null pass is asked for without a negative prompt; see `NULL_PROMPTS`.

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
        null_prompt: str = "learned",
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
            mask_image: what to repaint, white, in the image's proportions: the tokens it touches are drawn anew. The
                others keep the latents of the image exactly.
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
        conditions, null_condition, mixture = self._conditions(
            prompts, num_images_per_prompt, interpolate_to, interpolation, device
        )
        known = None if image is None else self.encode_image(image, mask_image, noise, num_images_per_prompt)
        if strength is None:
            strength = 1.0 if image is None or mask_image is not None else _EDITING_STRENGTH
        has_steps = lay_partial_grid(self.scheduler, strength, self._options.num_inference_steps, sigmas, device)
        sample = noise if known is None else known.at(self._time_before(0) if has_steps else 0.0)
        if has_steps:
            predict = self.guided_prediction(conditions, null_condition, mixture)
            sample = self.denoise([sample], predict, generator, callback_on_step_end, tensor_inputs, known)
        images = self.finish_call(sample, output_type)
        return TextToImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(
        self,
        prompt: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds_mask: torch.Tensor | None = None,
        device: torch.device | None = None,
        do_classifier_free_guidance: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Read prompts; of the components only the text encoder is used, and not even it for embeddings.

        Args:
            prompt, negative_prompt, num_images_per_prompt: of the call.
            prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask: of the call.
            device: of the result; the pipeline's by default.
            do_classifier_free_guidance: whether a null pass will be made.

        Returns:
            For B images embeddings (B, L, D), their mask (B, L), and both of the null pass, which are None without
            guidance. A learned null prompt is zeros and a mask that is all False. The call takes them by these names.

        Raises:
            UserError: neither or both of a text and its embeddings, what is no prompt, texts without a text encoder.
        """
        device = self._execution_device if device is None else torch.device(device)
        given = PromptArgument("prompt", prompt, prompt_embeds, prompt_embeds_mask)
        negative = PromptArgument(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask
        )
        for argument in (given, negative):
            argument.check(self.text_encoder, self._text_dim)
        if not given.is_given:
            raise UserError("prompt is missing; give a text, a list of texts, or prompt_embeds")
        prompt_embeds, prompt_embeds_mask = given.embed(self.text_encoder, device)
        negative_prompt_embeds = negative_prompt_embeds_mask = None
        if do_classifier_free_guidance:
            null = self._null_prompt(negative, prompt_embeds, device)
            null = as_many(*null, len(prompt_embeds), negative.name)
            (prompt_embeds, prompt_embeds_mask), null = of_one_length((prompt_embeds, prompt_embeds_mask), null)
            negative_prompt_embeds, negative_prompt_embeds_mask = _repeated(null, num_images_per_prompt)
        prompt_embeds, prompt_embeds_mask = _repeated((prompt_embeds, prompt_embeds_mask), num_images_per_prompt)
        return prompt_embeds, prompt_embeds_mask, negative_prompt_embeds, negative_prompt_embeds_mask

    def _null_prompt(
        self, negative: PromptArgument, prompt_embeds: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and mask of the null pass, for one prompt or for each."""
        if negative.is_given:
            return negative.embed(self.text_encoder, device)
        if self.config["null_prompt"] == "learned":
            nothing = torch.zeros_like(prompt_embeds)
            return nothing, nothing.new_zeros(nothing.shape[:2], dtype=torch.bool)
        if self.text_encoder is None:
            raise UserError(
                "negative_prompt_embeds is missing: this pipeline's null prompt is the empty text, and it has no "
                "text_encoder to read it; give the embeddings of '', or use guidance_scale=1"
            )
        return PromptArgument("negative_prompt", "", None, None).embed(self.text_encoder, device)

    @property
    def _text_dim(self) -> int | None:
        return None if self.transformer is None else self.transformer.config.get("text_dim", 0)

    def encode_image(
        self, image: Images, mask_image: Images | None, noise: torch.Tensor, num_images_per_prompt: int = 1
    ) -> KnownImage:
        """Encode images to edit.

        Args:
            image: of the call.
            mask_image: of the call.
            noise: start noise (B, C, h, w), whose grid says the size.
            num_images_per_prompt: of the call.

        Raises:
            UserError: what is no image, another number of them than prompts, of a size that is not encoded, or a mask
                of other proportions than its image.
        """
        grid, prompts = (noise.shape[2], noise.shape[3]), len(noise) // num_images_per_prompt
        size = decoded_size(self.vae, noise.shape[1:])
        pixels = image_batch(image, size, "image", channels=3).to(noise.device)
        clean = images_to_latents(self.vae, pixels, sample_posterior=False).float()
        repainted = None
        if mask_image is not None:
            check_frames(image, mask_image)
            mask = image_batch(mask_image, size, "mask_image", channels=1).to(noise.device)
            repainted = _one_per_prompt(token_mask(mask, grid), prompts, num_images_per_prompt, "mask_image")
        return KnownImage(_one_per_prompt(clean, prompts, num_images_per_prompt, "image"), noise, repainted)

    def latent_grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns (h, w) of the latents of images of a size in pixels, by default that of the training.

        Raises:
            UserError: no multiple of the patch, or a size that a component does not take.
        """
        own = self.transformer.latent_shape
        own_height, own_width = decoded_size(self.vae, own)
        factor = own_height // own[1]
        multiple = factor * self.transformer.config.patch_size
        size = {"height": own_height if height is None else height, "width": own_width if width is None else width}
        for name, pixels in size.items():
            if not is_number(pixels, Integral) or pixels < 1 or pixels % multiple:
                raise UserError(f"{name} is {pixels!r}; give a positive multiple of {multiple} px")
        grid = (int(size["height"]) // factor, int(size["width"]) // factor)
        if grid == own[1:]:
            return grid
        if not self.transformer.any_size:
            raise UserError(
                f"height and width are {size['height']} x {size['width']}, but {type(self.transformer).__name__} "
                f"samples {own_height} x {own_width} alone; leave them out"
            )
        try:
            decoded_size(self.vae, (own[0], *grid))
        except UserError as error:
            raise UserError(f"height and width are {size['height']} x {size['width']}: {error}") from None
        return grid

    def check_components(self) -> None:
        """See `LatentSamplingPipeline.check_components`; also a transformer without text, or of other embeddings."""
        if not self._text_dim:
            raise UserError(
                f"the transformer ({type(self.transformer).__name__}) takes no text; use ClassToImagePipeline, or "
                "one made with text_dim"
            )
        if self.text_encoder is not None and self.text_encoder.embed_dim != self._text_dim:
            raise UserError(
                f"text_encoder has embeddings of width {self.text_encoder.embed_dim}, the transformer takes "
                f"{self._text_dim}; they must agree"
            )
        super().check_components()

    def _check_null_condition(self) -> None:
        if self._text_dim and not self.transformer.config.text_dropout_prob:
            raise UserError(
                f"guidance_scale is {self.guidance_scale}, but the transformer was trained with a prompt in every "
                "sample (text_dropout_prob is 0); give a negative_prompt, or use guidance_scale=1"
            )

    def _check_editing(
        self,
        image: Images | None,
        strength: float | None,
        mask_image: Images | None,
        interpolate_to: Prompts | None,
        interpolation: float | Sequence[float] | None,
    ) -> None:
        """Refuse arguments that mean nothing without another."""
        for name, value in {"strength": strength, "mask_image": mask_image}.items():
            if value is not None and image is None:
                raise UserError(f"{name} is given without an image to edit; give image, or leave it out")
        if interpolation is not None and interpolate_to is None:
            raise UserError("interpolation is given without a second prompt; give interpolate_to, or leave it out")
        PromptArgument("interpolate_to", interpolate_to, None, None).check(self.text_encoder, self._text_dim)
        cache = getattr(self.transformer, "_cache_config", None)
        if interpolate_to is not None and isinstance(cache, FasterCacheConfig):
            raise UserError(
                "interpolate_to is given, but the transformer has FasterCache, which splits a batch in two; "
                "disable_cache(), or use another cache"
            )

    def _conditions(
        self,
        prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        num_images_per_prompt: int,
        interpolate_to: Prompts | None,
        interpolation: float | Sequence[float] | None,
        device: torch.device,
    ) -> tuple[list[Condition], Condition | None, torch.Tensor | None]:
        """Arguments of the transformer for one or two prompts, for the null pass, and the share of the second one."""
        *first, null_embeds, null_mask = prompts
        asked, mixture = [(first[0], first[1])], None
        if interpolate_to is not None:
            count = len(first[0]) // num_images_per_prompt
            second = PromptArgument("interpolate_to", interpolate_to, None, None).embed(self.text_encoder, device)
            second = as_many(*second, count, "interpolate_to")
            asked.append(_repeated(second, num_images_per_prompt))
            mixture = _shares(0.5 if interpolation is None else interpolation, len(first[0]), device)
            if bool((mixture == mixture[0]).all()) and mixture[0] in (0, 1):  # one of them is not asked for
                asked, mixture = [asked[int(mixture[0])]], None
        if null_embeds is not None and null_mask is not None:
            asked.append((null_embeds, null_mask))
        arguments = [
            {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
            for embeddings, mask in of_one_length(*asked)
        ]
        null = arguments.pop() if null_embeds is not None else None
        return arguments, null, mixture

    def _callback_places(self, predict: GuidedPrediction) -> dict[str, tuple[Any, Any]]:
        null = {"encoder_hidden_states": None} if predict.null_condition is None else predict.null_condition
        return {
            "prompt_embeds": (predict.conditions[0], "encoder_hidden_states"),
            "negative_prompt_embeds": (null, "encoder_hidden_states"),
        }


def _repeated(prompts: tuple[torch.Tensor, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings, mask = prompts
    return embeddings.repeat_interleave(count, dim=0), mask.repeat_interleave(count, dim=0)


def _one_per_prompt(images: torch.Tensor, prompts: int, count: int, name: str) -> torch.Tensor:
    if len(images) not in (1, prompts):
        raise UserError(f"{name} has {len(images)} images for {prompts} prompts; give one, or one per prompt")
    return images.expand(prompts, *images.shape[1:]).repeat_interleave(count, dim=0)


def _shares(interpolation: float | Sequence[float], batch_size: int, device: torch.device) -> torch.Tensor:
    try:
        shares = torch.as_tensor(interpolation, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"interpolation is {interpolation!r}; give a number in [0, 1], or one per image") from None
    if len(shares) not in (1, batch_size) or not bool(((shares >= 0) & (shares <= 1)).all()):
        raise UserError(
            f"interpolation is {interpolation!r}; give a number in [0, 1], or one for each of {batch_size} images"
        )
    return shares.expand(batch_size).to(device)

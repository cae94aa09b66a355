"""Class-conditional (or unconditional) sampling in any latent space: labels in, pictures out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from repagen.errors import UserError
from repagen.flow.guidance import GuidanceMethod
from repagen.pipelines.components import Autoencoder, Scheduler, Transformer
from repagen.pipelines.guided_prediction import Condition
from repagen.pipelines.labels import ClassLabels, resolve_class_labels
from repagen.pipelines.latent_sampling import (
    LatentSamplingPipeline,
    SampledImages,
    StepCallback,
    check_generators,
    tensor_inputs_of,
)
from repagen.pipelines.sampling_options import SamplingOptions
from repagen.schedulers.presets import lay_grid


class ClassToImagePipelineOutput(SampledImages):
    """What `ClassToImagePipeline` returns; see `SampledImages`."""


class ClassToImagePipeline(LatentSamplingPipeline):
    """Samples latents of given classes by following a transformer's predictions, and decodes them.

    The autoencoder's encoder is never used. Sampler state and times are float32 whatever the models' dtype. A
    transformer with a class token (REG, 2507.01467) has one drawn after the latents, from the same generator, and
    denoised beside them.

    Args:
        transformer: predicts at (x_t, t, class).
        vae: decodes latents: an autoencoder of ours, or diffusers' `AutoencoderKL` or `AutoencoderRAE`.
        scheduler: walks the times from 1 (noise) to 0 (data); its config holds the time shift. A transformer of
            integer steps (DiT) takes diffusers' `DDPMScheduler` or `DDIMScheduler`.
        guidance_transformer: a weaker model of the same latents and classes, for autoguidance (2406.02507); where it
            is set, autoguidance is the method by default, else classifier-free guidance (2207.12598).
        id2label: class id (as a string) => name; commas separate synonyms.
        sampling_defaults: what calls use for arguments that are not given, by the fields of `SamplingOptions`: the
            recipe's number of steps and guidance.

    Raises:
        UserError: `sampling_defaults` with an unknown key or a value that no model takes.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]  # diffusers declares it as None

    def __init__(
        self,
        transformer: Transformer,
        vae: Autoencoder,
        scheduler: Scheduler,
        guidance_transformer: Transformer | None = None,
        id2label: dict[str, str] | None = None,
        sampling_defaults: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        names = None if id2label is None else {str(class_id): name for class_id, name in id2label.items()}
        SamplingOptions.resolve(sampling_defaults, {})
        self.register_to_config(id2label=names, sampling_defaults=sampling_defaults)
        self.image_processor = VaeImageProcessor(do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_channels: int | None = None,
        guidance_method: GuidanceMethod | None = None,
        zero_init_steps: int | None = None,
        num_loops: int | None = None,
    ) -> ClassToImagePipelineOutput | tuple[Any]:
        """Draw images of classes.

        Sampling options (steps, guidance, loops) that are None are those of the pipeline's `sampling_defaults`; what
        these leave open is as in `SamplingOptions`: 50 steps, no guidance.

        Args:
            class_labels: ids in [0, num_classes), names of `id2label`, an integer tensor, or lists of these, nested or
                not. None for an unconditional model, and only there.
            num_inference_steps: in the scheduler's counting (RAE's counts grid points, so one step fewer).
            guidance_scale: weak + scale (strong - weak); 1 or less leaves guidance and its evaluations out.
            guidance_interval: (low, high) in t, both ends included, t = 1 is noise; no weak pass outside.
            num_images_per_prompt: images per label, or images altogether from an unconditional model.
            generator: one for a stream over the batch, or a list with one per image.
            latents: start noise (B, C, h, w), standard normal, instead of drawing it.
            sigmas: unshifted falling times in [0, 1] instead of the scheduler's own grid.
            output_type: "pil", "np", "pt" or "latent"; see `ClassToImagePipelineOutput`.
            return_dict: False returns a tuple.
            attention_kwargs: {"scale": factor} multiplies LoRA layers.
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; what it returns under
                "latents" replaces them.
            callback_on_step_end_tensor_inputs: names of the tensors it gets, among `_callback_tensor_inputs`.
            guidance_channels: guide only the first so many channels of the latent (DiT, SiT and LightningDiT: 3).
            guidance_method: "cfg", "autoguidance" or "internal" (a base head's prediction is the weak one).
            zero_init_steps: first steps with velocity 0, where guidance is on (SVG: 1).
            num_loops: loops of a looped generator.

        Returns:
            The images, `ClassToImagePipelineOutput` or a tuple with them.

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
            "num_loops": num_loops,
        }
        self.begin_call(given, attention_kwargs)
        self.check_inputs(class_labels, num_images_per_prompt, output_type, tensor_inputs)

        device = self._execution_device
        batch_size, labels = self.prepare_class_labels(class_labels, num_images_per_prompt, generator, device)
        latents = self.prepare_latents((batch_size, *self.transformer.latent_shape), generator, latents, device)
        lay_grid(self.scheduler, self._options.num_inference_steps, sigmas, device)
        state = [latents, *self.prepare_class_token(batch_size, generator, device)]
        predict = self.guided_prediction(*self._conditions(labels))
        latents = self.denoise(state, predict, generator, callback_on_step_end, tensor_inputs)
        images = self.finish_call(latents, output_type)
        return ClassToImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self,
        class_labels: ClassLabels | None,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Refuse arguments of `__call__` that do not fit together or do not fit the models.

        Raises:
            UserError: names the argument and what is allowed.
        """
        config = self.transformer.config
        if class_labels is None and config.num_classes > 0:
            raise UserError(f"class_labels is missing; give ids from 0 to {config.num_classes - 1}, or class names")
        if class_labels is not None and config.num_classes == 0:
            raise UserError("class_labels was given to an unconditional model; leave it out")
        self.check_call(num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)

    def _check_null_condition(self) -> None:
        config = self.transformer.config
        if config.num_classes == 0 or config.class_dropout_prob == 0:
            raise UserError(
                f"guidance_scale is {self.guidance_scale}, but the transformer was trained without a null class; "
                "use guidance_scale=1, or a pipeline with a guidance_transformer"
            )

    def check_components(self) -> None:
        """See `LatentSamplingPipeline.check_components`."""
        if self.transformer.config.get("text_dim"):
            raise UserError(
                f"the transformer takes text (text_dim is {self.transformer.config.text_dim}), which a "
                "ClassToImagePipeline has not; use TextToImagePipeline"
            )
        super().check_components()

    def prepare_class_labels(
        self,
        class_labels: ClassLabels | None,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> tuple[int, torch.Tensor | None]:
        """Return the number of images and their class ids (B,) int64, None for an unconditional model.

        Without labels a list of generators sets the number of images.

        Raises:
            UserError: labels of no class, or a list of generators of another length than the batch.
        """
        if class_labels is None:
            batch_size, labels = num_images_per_prompt, None
            if isinstance(generator, list) and num_images_per_prompt == 1:
                batch_size = len(generator)
        else:
            ids = resolve_class_labels(class_labels, self.transformer.config.num_classes, self.config["id2label"])
            labels = torch.tensor(ids, dtype=torch.long, device=device).repeat_interleave(num_images_per_prompt)
            batch_size = len(labels)
        if batch_size == 0:
            raise UserError("class_labels is empty; give at least one class")
        check_generators(generator, batch_size)
        return batch_size, labels

    def _conditions(self, labels: torch.Tensor | None) -> tuple[list[Condition], Condition | None]:
        """Arguments of the transformer for classes (B,), and for the null class."""
        if labels is None:
            return [{}], None
        return [{"class_labels": labels}], {
            "class_labels": torch.full_like(labels, self.transformer.config.num_classes)
        }

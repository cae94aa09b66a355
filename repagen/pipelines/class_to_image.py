"""Class-conditional (or unconditional) sampling in any latent space: labels in, pictures out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput, is_torch_xla_available
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from PIL import Image

from repagen.errors import UserError
from repagen.flow.guidance import GuidanceInterval, guide
from repagen.flow.path import to_velocity
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.models.latents import latent_shape, latents_to_images
from repagen.models.transformer_ditdh import DiTDHTransformer2DModel
from repagen.models.transformer_sit import SiTTransformer2DModel
from repagen.pipelines.labels import ClassLabels, resolve_class_labels
from repagen.registration import is_loadable_library
from repagen.schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from repagen.schedulers.euler_truncated import FlowMatchEulerTruncatedScheduler
from repagen.schedulers.heun import FlowMatchHeunScheduler
from repagen.schedulers.presets import unshifted_sigmas

Transformer = SiTTransformer2DModel | DiTDHTransformer2DModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ClassToImagePipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        images: a list of PIL images; or an array (B, H, W, 3) or tensor (B, 3, H, W) of floats in [0, 1]; or, for
            `output_type="latent"`, the loop's latents (B, C, h, w) float32.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


class ClassToImagePipeline(DiffusionPipeline):
    """Samples latents of given classes by following a transformer's velocity field, and decodes them.

    The autoencoder's encoder is never used. Sampler state and times are float32 whatever the models' dtype.

    Args:
        transformer: predicts at (x_t, t, class).
        vae: decodes latents: `RepresentationAutoencoder`, or diffusers' `AutoencoderKL` or `AutoencoderRAE`.
        scheduler: walks the times from 1 (noise) to 0 (data); its config holds the time shift.
        guidance_transformer: a weaker model of the same latents and classes; where it is set, guidance is
            autoguidance (2406.02507) by it, else classifier-free guidance (2207.12598) by the null class.
        id2label: class id (as a string) => name; commas separate synonyms.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]  # diffusers declares it as None
    _optional_components: ClassVar[list[str]] = ["guidance_transformer"]  # type: ignore[misc]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    transformer: Any
    vae: Any
    scheduler: Any
    guidance_transformer: Any
    # State of the running or last call, read through the properties below.
    _guidance_scale: float = 1.0
    _guidance_interval = GuidanceInterval()
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    _interrupt: bool = False

    def __init__(
        self,
        transformer: SiTTransformer2DModel | DiTDHTransformer2DModel,
        vae: RepresentationAutoencoder | AutoencoderKL | AutoencoderRAE,
        scheduler: FlowMatchEulerDiscreteScheduler
        | FlowMatchEulerTruncatedScheduler
        | FlowMatchHeunScheduler
        | FlowMatchEulerMaruyamaScheduler,
        guidance_transformer: SiTTransformer2DModel | DiTDHTransformer2DModel | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, guidance_transformer=guidance_transformer
        )
        names = None if id2label is None else {str(class_id): name for class_id, name in id2label.items()}
        self.register_to_config(id2label=names)
        self.image_processor = VaeImageProcessor(do_normalize=False)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """Download a pipeline's repository and return its folder; see `DiffusionPipeline.download`."""
        if is_loadable_library():
            return super().download(pretrained_model_name, **kwargs)
        # diffusers would refuse components of a library it does not list, so fetch the whole repository.
        passed_on = ("cache_dir", "force_download", "local_files_only", "revision", "token")
        return snapshot_download(pretrained_model_name, **{key: kwargs[key] for key in passed_on if key in kwargs})

    @property
    def components(self) -> dict[str, Any]:
        """The components that are set, by name."""
        return {name: part for name, part in super().components.items() if part is not None}

    @property
    def guidance_scale(self) -> float:
        """Scale of the guidance; above 1 it acts. A callback may change `_guidance_scale` between steps."""
        return self._guidance_scale

    @property
    def guidance_interval(self) -> GuidanceInterval:
        """Times at which guidance acts."""
        return self._guidance_interval

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guided steps make a null pass."""
        return self._guidance_scale > 1 and self.guidance_transformer is None

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Passed to the models; {"scale": s} scales LoRA layers."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of points at which the loop evaluates the transformer."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Scheduler timestep of the running evaluation, None outside the loop; some caches read it."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the loop is skipped; a callback sets `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ClassToImagePipelineOutput | tuple[Any]:
        """Draw images of classes.

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
            attention_kwargs: passed to the transformers, for example {"scale": 0.5} for LoRA.
            callback_on_step_end: called as (pipeline, index, timestep, tensors) after each step; what it returns under
                "latents" replaces them.
            callback_on_step_end_tensor_inputs: names of the tensors it gets, among `_callback_tensor_inputs`.

        Returns:
            The images, `ClassToImagePipelineOutput` or a tuple with them.

        Raises:
            UserError: (a ValueError) an argument does not fit the models; it names the argument and what is allowed.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._guidance_scale = guidance_scale
        self._guidance_interval = GuidanceInterval(*guidance_interval)
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        self._current_timestep = None
        self.check_inputs(class_labels, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)

        device = self._execution_device
        batch_size, labels = self.prepare_class_labels(class_labels, num_images_per_prompt, generator, device)
        latents = self.prepare_latents(batch_size, generator, latents, device)
        own_sigmas = unshifted_sigmas(self.scheduler, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=own_sigmas if sigmas is None else sigmas, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                velocity = self.predict_velocity(latents, timestep, labels, index)
                latents = self.scheduler.step(velocity, timestep, latents, generator=generator, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, index, timestep, tensors).get("latents", latents)
                progress_bar.update()
                _end_xla_step()
        self._current_timestep = None

        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
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
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale is {self.guidance_scale}; give a finite number")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt is {num_images_per_prompt}; give at least 1")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            allowed = ", ".join(self._callback_tensor_inputs)
            raise UserError(f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}; allowed: {allowed}")
        if class_labels is None and config.num_classes > 0:
            raise UserError(f"class_labels is missing; give ids from 0 to {config.num_classes - 1}, or class names")
        if class_labels is not None and config.num_classes == 0:
            raise UserError("class_labels was given to an unconditional model; leave it out")
        if self.do_classifier_free_guidance and (config.num_classes == 0 or config.class_dropout_prob == 0):
            raise UserError(
                f"guidance_scale is {self.guidance_scale}, but the transformer was trained without a null class; "
                "use guidance_scale=1, or a pipeline with a guidance_transformer"
            )
        self._check_components()

    def _check_components(self) -> None:
        """Refuse models that do not work in one latent space, before the first evaluation."""
        if self.guidance_transformer is not None:
            for key in ("in_channels", "sample_size", "num_classes"):
                ours, other = self.transformer.config[key], self.guidance_transformer.config[key]
                if ours != other:
                    raise UserError(f"guidance_transformer has {key} {other}, the transformer {ours}; they must agree")
        sampled = self._latent_shape
        if isinstance(self.vae, AutoencoderKL):  # takes any height and width
            decoded = (self.vae.config.latent_channels, *sampled[1:])
        else:
            own_size = self.vae.decoder_image_size if isinstance(self.vae, AutoencoderRAE) else self.vae.image_size
            decoded = latent_shape(self.vae, own_size)
        if sampled != decoded:
            raise UserError(
                f"the transformer samples latents {sampled}, but the vae decodes {decoded}; they must agree"
            )

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
        if isinstance(generator, list) and len(generator) != batch_size:
            raise UserError(f"generator is a list of {len(generator)} for {batch_size} images; give one per image")
        return batch_size, labels

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Return the start noise (B, C, h, w) float32: drawn, or the given one checked.

        Raises:
            UserError: given latents of another shape.
        """
        shape = (batch_size, *self._latent_shape)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents has shape {tuple(latents.shape)}; this call takes {shape}")
        return latents.to(device=device, dtype=torch.float32)

    def predict_velocity(
        self, latents: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None, index: int
    ) -> torch.Tensor:
        """Velocity (B, C, h, w) float32 at the latents, guided where guidance acts.

        Args:
            latents: (B, C, h, w) float32.
            timestep: scalar, in the scheduler's units.
            labels: (B,) class ids or None.
            index: of this evaluation in the loop.
        """
        t = timestep.to(torch.float32) / self.scheduler.config.num_train_timesteps
        inside = self._guidance_scale > 1 and self._guidance_interval.contains(t)
        if labels is not None and self.do_classifier_free_guidance and self.transformer.is_cache_enabled:
            # The state of a cache belongs to a batch of one shape, so both passes share one batch at every step.
            both = torch.cat([self._null_labels(labels), labels])
            weak, strong = self._evaluate(
                self.transformer, "cond_uncond", torch.cat([latents, latents]), t, both, index
            ).chunk(2)
            return guide(weak, strong, self._guidance_scale) if inside else strong
        strong = self._evaluate(self.transformer, "cond", latents, t, labels, index)
        if not inside:
            return strong
        if self.guidance_transformer is not None:
            weak = self._evaluate(self.guidance_transformer, "cond", latents, t, labels, index)
        else:
            weak = self._evaluate(self.transformer, "uncond", latents, t, self._null_labels(labels), index)
        return guide(weak, strong, self._guidance_scale)

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Decode latents (B, C, h, w) to images clamped to [0, 1], as "pil", "np" or "pt"."""
        images = latents_to_images(self.vae, latents)
        return self.image_processor.postprocess(images, output_type=output_type)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.transformer.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.transformer.config.in_channels, height, width

    def _null_labels(self, labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None  # check_inputs refuses classifier-free guidance of unconditional models
        return torch.full_like(labels, self.transformer.config.num_classes)

    def _evaluate(
        self,
        model: Transformer,
        context: str,
        latents: torch.Tensor,
        t: torch.Tensor,
        labels: torch.Tensor | None,
        index: int,
    ) -> torch.Tensor:
        """One forward of a model, as float32 velocity."""
        with model.cache_context(context, step_index=index, sigma=float(t), num_inference_steps=self._num_timesteps):
            prediction = model(
                hidden_states=latents.to(model.dtype),
                timestep=t.expand(latents.shape[0]),
                class_labels=labels,
                attention_kwargs=self._attention_kwargs,
                return_dict=False,
            )[0]
        return to_velocity(prediction.float(), latents, t, model.config.prediction_type)


def _end_xla_step() -> None:
    if is_torch_xla_available():
        import torch_xla.core.xla_model as xm

        xm.mark_step()

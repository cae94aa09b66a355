"""Class-conditional (or unconditional) sampling in any latent space: labels in, pictures out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import FasterCacheConfig
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, is_torch_xla_available
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from repagen.errors import UserError
from repagen.flow.guidance import GuidanceInterval, GuidanceMethod
from repagen.hub.published import PublishedMixin
from repagen.layers.lora import check_attention_kwargs
from repagen.models.latents import decoded_size, latents_to_images
from repagen.pipelines.components import Autoencoder, Scheduler, Transformer
from repagen.pipelines.guided_prediction import GuidedPrediction, class_token_dim, is_discrete, learns_variance
from repagen.pipelines.labels import ClassLabels, resolve_class_labels
from repagen.pipelines.loading import CommitLoading
from repagen.pipelines.lora import AdapterMixin
from repagen.pipelines.sampling_options import SamplingOptions
from repagen.schedulers.presets import DISCRETE_SCHEDULERS, lay_grid

if TYPE_CHECKING:
    from repagen.hub.card import LicenceFact

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class ClassToImagePipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        images: a list of PIL images; or an array (B, H, W, 3) or tensor (B, 3, H, W) of floats in [0, 1]; or, for
            `output_type="latent"`, the loop's latents (B, C, h, w) float32.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


class ClassToImagePipeline(PublishedMixin, AdapterMixin, CommitLoading):
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
    _optional_components: ClassVar[list[str]] = ["guidance_transformer"]  # type: ignore[misc]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    transformer: Any
    vae: Any
    scheduler: Any
    guidance_transformer: Any
    # State of the running or last call, read through the properties below.
    _options = SamplingOptions()
    _guidance_scale: float = 1.0
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    _interrupt: bool = False

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

    def part_licences(self) -> Sequence[LicenceFact]:
        """See `PublishedMixin.part_licences`: those of the autoencoder's parts."""
        return self.vae.part_licences() if isinstance(self.vae, PublishedMixin) else ()

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
        return GuidanceInterval(*self._options.guidance_interval)

    @property
    def guidance_method(self) -> GuidanceMethod:
        """Whose prediction guidance extrapolates from."""
        by_components: GuidanceMethod = "cfg" if self.guidance_transformer is None else "autoguidance"
        return self._options.guidance_method or by_components

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guided steps make a null pass."""
        return self._guidance_scale > 1 and self.guidance_method == "cfg"

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

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload groups of layers of every model; arguments as diffusers'.

        Raises:
            UserError: to disk with a guidance_transformer. diffusers names the files by the layers' names, so the two
                transformers would overwrite each other's.
        """
        given = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        folder, excluded = given.get("offload_to_disk_path"), given.get("exclude_modules") or []
        kept = {excluded} if isinstance(excluded, str) else set(excluded)
        if folder is not None and len({"transformer", "guidance_transformer"} & set(self.components) - kept) > 1:
            raise UserError(
                f"offload_to_disk_path is {str(folder)!r}, where transformer and guidance_transformer would overwrite "
                "each other's files; call enable_group_offload on each model with a folder of its own"
            )
        super().enable_group_offload(*args, **kwargs)

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
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
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
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        given = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_channels": guidance_channels,
            "guidance_method": guidance_method,
            "zero_init_steps": zero_init_steps,
            "num_loops": num_loops,
        }
        self._options = self.sampling_options(given)
        self._guidance_scale = self._options.guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        self._current_timestep = None
        self.check_inputs(
            class_labels, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs, attention_kwargs
        )

        device = self._execution_device
        batch_size, labels = self.prepare_class_labels(class_labels, num_images_per_prompt, generator, device)
        latents = self.prepare_latents(batch_size, generator, latents, device)
        lay_grid(self.scheduler, self._options.num_inference_steps, sigmas, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        state = [latents, *self.prepare_class_token(batch_size, generator, device)]
        # A scheduler remembers the place it has reached, so every part of the state walks with one of its own.
        schedulers = [self.scheduler, *(copy.deepcopy(self.scheduler) for _ in state[1:])]
        predict = GuidedPrediction(
            transformer=self.transformer,
            guidance_transformer=self.guidance_transformer,
            method=self.guidance_method,
            options=self._options,
            labels=labels,
            scheduler=self.scheduler,
            attention_kwargs=attention_kwargs,
        )

        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                predictions = predict(state, timestep, index, self._guidance_scale)
                state = [
                    scheduler.step(prediction, timestep, part, generator=generator, return_dict=False)[0]
                    for scheduler, prediction, part in zip(schedulers, predictions, state, strict=True)
                ]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, state[0])
                    state[0] = callback_on_step_end(self, index, timestep, tensors).get("latents", state[0])
                progress_bar.update()
                _end_xla_step()
        self._current_timestep = None

        latents = state[0]
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ClassToImagePipelineOutput(images=images) if return_dict else (images,)

    def sampling_options(self, given: Mapping[str, Any]) -> SamplingOptions:
        """Options of a call: what was given (None counts as not given), then `sampling_defaults`, then the library's.

        Raises:
            UserError: a value that no model takes.
        """
        return SamplingOptions.resolve(self.config["sampling_defaults"], given)

    def check_inputs(
        self,
        class_labels: ClassLabels | None,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse arguments of `__call__` that do not fit together or do not fit the models.

        Raises:
            UserError: names the argument and what is allowed.
        """
        config = self.transformer.config
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
        check_attention_kwargs(attention_kwargs)
        self._check_guidance()
        self.check_components()

    def _check_guidance(self) -> None:
        """Refuse guidance and loops that the transformer does not have."""
        config, options = self.transformer.config, self._options
        if options.num_loops is not None and "num_loops" not in config:
            raise UserError(f"num_loops is {options.num_loops}, but the transformer is not looped; leave it out")
        null_class = config.num_classes > 0 and config.class_dropout_prob > 0
        if self.guidance_scale > 1 and self.guidance_method == "cfg" and not null_class:
            raise UserError(
                f"guidance_scale is {self.guidance_scale}, but the transformer was trained without a null class; "
                "use guidance_scale=1, or a pipeline with a guidance_transformer"
            )
        if self.guidance_method == "autoguidance" and self.guidance_transformer is None:
            raise UserError("guidance_method is 'autoguidance', but the pipeline has no guidance_transformer; set one")
        if self.guidance_method == "internal" and not getattr(self.transformer, "has_base_head", False):
            name = type(self.transformer).__name__
            raise UserError(f"guidance_method is 'internal', but {name} has no base head; use 'cfg' or 'autoguidance'")
        if (options.guidance_channels or 1) > config.in_channels:
            raise UserError(
                f"guidance_channels is {options.guidance_channels}; this model's latents have {config.in_channels}"
            )
        if options.zero_init_steps and is_discrete(self.transformer):
            raise UserError("zero_init_steps needs a velocity, which a transformer of integer steps has not; use 0")
        self._check_caches()

    def _check_caches(self) -> None:
        """Refuse FasterCache, which takes the first half of a batch for the null pass, where no batch is made so."""
        for name in ("transformer", "guidance_transformer"):
            cache = getattr(getattr(self, name), "_cache_config", None)
            splits = isinstance(cache, FasterCacheConfig) and not cache.is_guidance_distilled
            if splits and not self.do_classifier_free_guidance:
                raise UserError(
                    f"the {name} has FasterCache, which needs classifier-free guidance, but guidance_method is "
                    f"{self.guidance_method!r} and guidance_scale {self.guidance_scale}; use 'cfg' and a scale above "
                    "1, or disable_cache() and another cache"
                )

    def check_options(self, given: Mapping[str, Any]) -> None:
        """Refuse components that do not work together, and sampling options that they cannot meet; samples nothing.

        Args:
            given: option => value, as in a call; what is left out is the pipeline's own default.

        Raises:
            UserError: names the option or the components and what is allowed.
        """
        self._options = self.sampling_options(given)
        self._guidance_scale = self._options.guidance_scale
        self._check_guidance()
        self.check_components()
        lay_grid(copy.deepcopy(self.scheduler), self._options.num_inference_steps)

    def check_components(self) -> None:
        """Refuse components that do not work together; every call does so before the first evaluation.

        Raises:
            UserError: names the components and what must agree.
        """
        if self.guidance_transformer is not None:
            weaker = _traits(self.guidance_transformer)
            for key, ours in _traits(self.transformer).items():
                if ours != weaker[key]:
                    raise UserError(
                        f"guidance_transformer has {key} {weaker[key]}, the transformer {ours}; they must agree"
                    )
        discrete = is_discrete(self.transformer)
        if discrete != isinstance(self.scheduler, DISCRETE_SCHEDULERS):
            grid, preset = (
                ("integer steps", "'dit-ddpm'") if discrete else ("explicit grid of flow times", "a flow preset")
            )
            raise UserError(
                f"scheduler {type(self.scheduler).__name__} takes no {grid}, which {type(self.transformer).__name__} "
                f"is sampled with; use {preset} of repagen.sampler_preset"
            )
        if discrete and learns_variance(self.scheduler) and not self.transformer.config.learn_sigma:
            raise UserError(
                "the scheduler's variance_type is 'learned_range', but the transformer predicts no variance "
                "(learn_sigma=False); use variance_type='fixed_small', or the preset 'dit-ddim'"
            )
        try:
            decoded_size(self.vae, self.transformer.latent_shape)
        except UserError as error:
            raise UserError(
                f"the vae does not decode what the transformer samples, {self.transformer.latent_shape}: {error}"
            ) from None

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
        shape = (batch_size, *self.transformer.latent_shape)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents has shape {tuple(latents.shape)}; this call takes {shape}")
        return latents.to(device=device, dtype=torch.float32)

    def prepare_class_token(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None, device: torch.device
    ) -> list[torch.Tensor]:
        """Start noise (B, D) float32 of the class token, in a list; an empty one where the transformer has none."""
        width = class_token_dim(self.transformer)
        return [randn_tensor((batch_size, width), generator=generator, device=device)] if width else []

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Decode latents (B, C, h, w) to images clamped to [0, 1], as "pil", "np" or "pt"."""
        images = latents_to_images(self.vae, latents)
        return self.image_processor.postprocess(images, output_type=output_type)


def _traits(transformer: Any) -> dict[str, Any]:
    """What two models must share to guide one another."""
    config = transformer.config
    return {
        **{key: config[key] for key in ("in_channels", "sample_size", "num_classes")},
        "class_token_dim": class_token_dim(transformer),
        "discrete_time": is_discrete(transformer),
    }


def _end_xla_step() -> None:
    if is_torch_xla_available():
        import torch_xla.core.xla_model as xm

        xm.mark_step()

"""What pipelines share that sample a latent by following a transformer's predictions, and decode it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
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
from repagen.models.latents import latents_to_images, require_latents
from repagen.pipelines.guided_prediction import (
    Condition,
    GuidedPrediction,
    State,
    class_token_dim,
    is_discrete,
    learns_variance,
)
from repagen.pipelines.loading import CommitLoading
from repagen.pipelines.lora import AdapterMixin
from repagen.pipelines.sampling_options import SamplingOptions, is_number
from repagen.schedulers.presets import DISCRETE_SCHEDULERS, lay_grid

if TYPE_CHECKING:
    from repagen.hub.card import LicenceFact
    from repagen.pipelines.editing import KnownImage

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

StepCallback = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks
"""Called as (pipeline, index, timestep, tensors by name) after each step; what it returns replaces the tensors."""


@dataclass
class SampledImages(BaseOutput):
    """What a pipeline returns.

    Attributes:
        images: a list of PIL images; or an array (B, H, W, 3) or tensor (B, 3, H, W) of floats in [0, 1]; or, for
            `output_type="latent"`, the loop's latents (B, C, h, w) float32.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor


class LatentSamplingPipeline(PublishedMixin, AdapterMixin, CommitLoading):
    """Options, loop and decoding of a pipeline; a subclass says what its conditions are.

    A subclass registers at least `transformer`, `vae`, `scheduler`, `guidance_transformer`, `sampling_defaults` in its
    config and `image_processor`, and writes `__call__` and `_check_null_condition`. Sampler state and times are
    float32 whatever the models' dtype. A transformer with a class token (REG, 2507.01467) has one drawn after the
    latents, from the same generator, and denoised beside them.
    """

    _optional_components: ClassVar[list[str]] = ["guidance_transformer"]  # type: ignore[misc]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    transformer: Any
    vae: Any
    scheduler: Any
    guidance_transformer: Any
    image_processor: VaeImageProcessor
    # State of the running or last call, read through the properties below.
    _options = SamplingOptions()
    _guidance_scale: float = 1.0
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    _interrupt: bool = False

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

    def sampling_options(self, given: Mapping[str, Any]) -> SamplingOptions:
        """Options of a call: what was given (None counts as not given), then `sampling_defaults`, then the library's.

        Raises:
            UserError: a value that no model takes.
        """
        return SamplingOptions.resolve(self.config["sampling_defaults"], given)

    def begin_call(self, given: Mapping[str, Any], attention_kwargs: dict[str, Any] | None) -> None:
        """Set the state of a call that begins.

        Args:
            given: sampling options, None where not given.
            attention_kwargs: of the call.

        Raises:
            UserError: a sampling option that no model takes.
        """
        self._options = self.sampling_options(given)
        self._guidance_scale = self._options.guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        self._current_timestep = None
        self._num_timesteps = 0

    def check_call(
        self,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
        *,
        null_given: bool = False,
    ) -> None:
        """Refuse arguments of a call that are no matter of its conditions, and components that do not fit together.

        Args:
            num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs: of the call.
            null_given: the call says itself what its null pass is asked for.

        Raises:
            UserError: names the argument and what is allowed.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}")
        if not is_number(num_images_per_prompt, Integral) or num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt is {num_images_per_prompt!r}; give a whole number, at least 1")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            allowed = ", ".join(self._callback_tensor_inputs)
            raise UserError(f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown))}; allowed: {allowed}")
        check_attention_kwargs(self._attention_kwargs)
        self._check_guidance(null_given)
        self.check_components()

    def _check_guidance(self, null_given: bool = False) -> None:
        """Refuse guidance and loops that the transformer does not have."""
        config, options = self.transformer.config, self._options
        if options.num_loops is not None and "num_loops" not in config:
            raise UserError(f"num_loops is {options.num_loops}, but the transformer is not looped; leave it out")
        if self.do_classifier_free_guidance and not null_given:
            self._check_null_condition()
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

    def _check_null_condition(self) -> None:
        """Refuse classifier-free guidance of a transformer that was trained with a condition in every sample."""
        raise NotImplementedError

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
            require_latents(self.vae, self.transformer.latent_shape)
        except UserError as error:
            raise UserError(
                f"the vae does not decode what the transformer samples, {self.transformer.latent_shape}: {error}"
            ) from None

    def prepare_latents(
        self,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Return the start noise (B, C, h, w) float32 of a shape: drawn, or the given one checked.

        Raises:
            UserError: given latents of another shape.
        """
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

    def guided_prediction(
        self,
        conditions: Sequence[Condition],
        null_condition: Condition | None,
        mixture: torch.Tensor | None = None,
    ) -> GuidedPrediction:
        """Return the model as this call's loop sees it; arguments as of `GuidedPrediction`."""
        return GuidedPrediction(
            transformer=self.transformer,
            guidance_transformer=self.guidance_transformer,
            method=self.guidance_method,
            options=self._options,
            conditions=conditions,
            null_condition=null_condition,
            scheduler=self.scheduler,
            attention_kwargs=self._attention_kwargs,
            mixture=mixture,
        )

    def denoise(
        self,
        state: State,
        predict: GuidedPrediction,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: StepCallback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        known: KnownImage | None = None,
    ) -> torch.Tensor:
        """Walk the scheduler's grid, which is laid, and return the latents (B, C, h, w) float32 at its end.

        Args:
            state: where to start; it is changed.
            predict: of `guided_prediction`.
            generator: of stochastic steps.
            callback_on_step_end: of the call.
            callback_on_step_end_tensor_inputs: names of the tensors it gets.
            known: an image of which a part is kept.
        """
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # A scheduler remembers the place it has reached, so every part of the state walks with one of its own.
        schedulers = [self.scheduler, *(copy.deepcopy(self.scheduler) for _ in state[1:])]
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for index, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                predictions = predict(state, timestep, index, self._guidance_scale)
                state[:] = [
                    scheduler.step(prediction, timestep, part, generator=generator, return_dict=False)[0]
                    for scheduler, prediction, part in zip(schedulers, predictions, state, strict=True)
                ]
                if known is not None:
                    state[0] = known.kept(state[0], self._time_before(index + 1))
                if callback_on_step_end is not None:
                    places = {"latents": (state, 0), **self._callback_places(predict)}
                    tensors = {name: places[name][0][places[name][1]] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, index, timestep, tensors)
                    for name in returned.keys() & places.keys():
                        place, key = places[name]
                        place[key] = returned[name]
                progress_bar.update()
                _end_xla_step()
        self._current_timestep = None
        return state[0]

    def _time_before(self, index: int) -> float:
        """The time t of the latents before an evaluation of the loop; 0 after the last, whose noise is all gone."""
        timesteps = self.scheduler.timesteps
        return 0.0 if index == len(timesteps) else float(timesteps[index]) / self.scheduler.config.num_train_timesteps

    def _callback_places(self, predict: GuidedPrediction) -> dict[str, tuple[Any, Any]]:
        """Tensors beside the latents that a callback may see and replace: name => (container, key)."""
        return {}

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """Decode latents (B, C, h, w) to images clamped to [0, 1], as "pil", "np" or "pt"."""
        images: Any = self.image_processor.postprocess(latents_to_images(self.vae, latents), output_type=output_type)
        return images

    def finish_call(self, latents: torch.Tensor, output_type: str) -> Any:
        """Return what a call returns as images, and let offloaded models go."""
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return images


def _traits(transformer: Any) -> dict[str, Any]:
    """What two models must share to guide one another."""
    config = transformer.config
    return {
        **{key: config[key] for key in ("in_channels", "sample_size", "num_classes")},
        "text_dim": config.get("text_dim") or 0,
        "class_token_dim": class_token_dim(transformer),
        "discrete_time": is_discrete(transformer),
    }


def _end_xla_step() -> None:
    if is_torch_xla_available():
        import torch_xla.core.xla_model as xm

        xm.mark_step()


def check_generators(generator: torch.Generator | list[torch.Generator] | None, batch_size: int) -> None:
    """Refuse what is no generator, and a list of generators of another length than the batch."""
    given: list[Any] = generator if isinstance(generator, list) else [generator] * (generator is not None)
    if strange := [one for one in given if not isinstance(one, torch.Generator)]:
        raise UserError(f"generator has a {type(strange[0]).__name__}; give a torch.Generator, or a list of them")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise UserError(f"generator is a list of {len(generator)} for {batch_size} images; give one per image")


def tensor_inputs_of(callback_on_step_end: StepCallback | None, names: Sequence[str]) -> Sequence[str]:
    """Names of the tensors that a callback gets: its own where it says them, else the given ones."""
    if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
        return callback_on_step_end.tensor_inputs
    return names

"""The model as a sampling loop sees it: one guided prediction per grid point, and no evaluation more than it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from repagen.errors import UserError
from repagen.flow.guidance import GuidanceInterval, GuidanceMethod, guide
from repagen.flow.path import to_velocity
from repagen.pipelines.sampling_options import SamplingOptions

State = list[torch.Tensor]
"""What is denoised, float32: the latents (B, C, h, w), and beside them a class token (B, D) where there is one."""

Condition: TypeAlias = dict[str, torch.Tensor]
"""What a transformer is asked for: arguments of its call, each with one row per image."""

# Each condition has a state of a cache of its own.
_CONTEXTS = ("cond", "cond_2")


@dataclass
class GuidedPrediction:
    """Evaluates a transformer, guided where guidance acts.

    Attributes:
        transformer: the strong model.
        guidance_transformer: the weak one of autoguidance.
        method: of guidance.
        options: of the call; the guidance scale comes with each prediction, since callbacks may change it.
        conditions: arguments of the models; a callback may change them between steps. Of two, the predictions are
            mixed.
        null_condition: those of the null pass; None where no null pass can be made.
        scheduler: of the loop, its grid laid.
        attention_kwargs: passed to the models.
        mixture: (B,) share of the second condition's prediction in [0, 1]; None where there is one condition.
    """

    transformer: Any
    guidance_transformer: Any
    method: GuidanceMethod
    options: SamplingOptions
    conditions: Sequence[Condition]
    null_condition: Condition | None
    scheduler: Any
    attention_kwargs: dict[str, Any] | None
    mixture: torch.Tensor | None = None

    def __call__(self, state: State, timestep: torch.Tensor, index: int, scale: float) -> State:
        """Predict what the scheduler steps along, one float32 tensor for each of the state's.

        Args:
            state: where to predict.
            timestep: scalar, in the scheduler's units.
            index: of this grid point in the loop.
            scale: of guidance; above 1 it acts.

        Returns:
            Velocities; or of a model of integer steps its raw output, of which a learned variance is never guided.
        """
        # A Heun step has two grid points. It is guided as a whole or not at all, by the time it starts at, as REPA's.
        step, second = divmod(index, self.scheduler.order)
        if scale > 1 and step < self.options.zero_init_steps:
            return [torch.zeros_like(part) for part in state]
        interval = GuidanceInterval(*self.options.guidance_interval)
        if not (scale > 1 and interval.contains(self._time(self.scheduler.timesteps[index - second]))):
            return self._unguided(state, timestep, index, scale)
        strong, weak = self._strong_and_weak(state, timestep, index)
        limits = (self.options.guidance_channels, None)
        return [
            guide(weak_part, strong_part, scale, limit or part.shape[1])
            for weak_part, strong_part, part, limit in zip(weak, strong, state, limits, strict=False)
        ]

    def _unguided(self, state: State, timestep: torch.Tensor, index: int, scale: float) -> State:
        # The call's own scale decides: a callback that ends the guidance must not change the batch under a cache.
        if self.method == "cfg" and self.options.guidance_scale > 1 and self.transformer.is_cache_enabled:
            return self._all_at_once(state, timestep, index)[0]
        return self._conditional(self.transformer, state, timestep, index)

    def _strong_and_weak(self, state: State, timestep: torch.Tensor, index: int) -> tuple[State, State]:
        model = self.transformer
        if self.method == "internal":
            strong, weak = self._mixed([
                self._both_heads(context, state, timestep, condition, index) for context, condition in self._contexts
            ])  # fmt: skip
            return [strong], [weak]
        if self.method == "cfg" and model.is_cache_enabled:
            return self._all_at_once(state, timestep, index)
        strong_state = self._conditional(model, state, timestep, index)
        if self.method == "autoguidance":
            return strong_state, self._conditional(self.guidance_transformer, state, timestep, index)
        return strong_state, self._evaluate(model, "uncond", state, timestep, self._null, index)

    def _all_at_once(self, state: State, timestep: torch.Tensor, index: int) -> tuple[State, State]:
        """With and without condition in one batch: the state of a cache belongs to a batch of one shape."""
        conditions = [self._null, *self.conditions]
        repeated = [torch.cat([part] * len(conditions)) for part in state]
        joined = {name: torch.cat([condition[name] for condition in conditions]) for name in self.conditions[0]}
        predictions = self._evaluate(self.transformer, "cond_uncond", repeated, timestep, joined, index)
        weak, *strong = (list(parts) for parts in zip(*(p.chunk(len(conditions)) for p in predictions), strict=True))
        return self._mixed(strong), weak

    @property
    def _contexts(self) -> list[tuple[str, Condition]]:
        return list(zip(_CONTEXTS, self.conditions, strict=False))

    def _conditional(self, model: Any, state: State, timestep: torch.Tensor, index: int) -> State:
        return self._mixed([
            self._evaluate(model, context, state, timestep, condition, index) for context, condition in self._contexts
        ])  # fmt: skip

    def _mixed(self, predictions: Sequence[State]) -> State:
        """Interpolate between the predictions for two conditions; exact at both ends."""
        if self.mixture is None:
            return predictions[0]
        first, second = predictions
        return [
            torch.lerp(a, b, self.mixture.reshape(-1, *[1] * (a.ndim - 1))) for a, b in zip(first, second, strict=True)
        ]

    def _both_heads(
        self, context: str, state: State, timestep: torch.Tensor, condition: Condition, index: int
    ) -> State:
        """The model's prediction for the latents and that of its base head, by one evaluation."""
        model, latents = self.transformer, state[0]
        both = self._forward(model, context, state, timestep, condition, index, return_base=True)
        return [self._convert(model, prediction, latents, timestep) for prediction in both[:2]]

    def _evaluate(
        self,
        model: Any,
        context: str,
        state: State,
        timestep: torch.Tensor,
        condition: Condition,
        index: int,
    ) -> State:
        """One forward of a model, as what the scheduler steps along."""
        predictions = self._forward(model, context, state, timestep, condition, index)
        return [self._convert(model, predictions[i], part, timestep) for i, part in enumerate(state)]

    def _forward(
        self,
        model: Any,
        context: str,
        state: State,
        timestep: torch.Tensor,
        condition: Condition,
        index: int,
        **arguments: Any,
    ) -> tuple[torch.Tensor, ...]:
        latents, *class_token = state
        if class_token:
            arguments["class_token"] = class_token[0].to(model.dtype)
        if self.options.num_loops is not None and model is self.transformer:
            arguments["num_loops"] = self.options.num_loops
        t = self._time(timestep)
        times = timestep if is_discrete(model) else t
        steps = len(self.scheduler.timesteps)
        with model.cache_context(context, step_index=index, sigma=float(t), num_inference_steps=steps):
            return model(
                hidden_states=latents.to(model.dtype),
                timestep=times.expand(latents.shape[0]),
                **condition,
                attention_kwargs=self.attention_kwargs,
                return_dict=False,
                **arguments,
            )

    def _convert(
        self, model: Any, prediction: torch.Tensor, part: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        if not is_discrete(model):
            return to_velocity(prediction.float(), part, self._time(timestep), model.config.prediction_type)
        return prediction.float() if learns_variance(self.scheduler) else prediction[:, : part.shape[1]].float()

    def _time(self, timestep: torch.Tensor) -> torch.Tensor:
        """The library's t of a scheduler's timestep; of a DDPM's integer step, its share of all steps."""
        return timestep.to(torch.float32) / self.scheduler.config.num_train_timesteps

    @property
    def _null(self) -> Condition:
        if self.null_condition is None:
            raise UserError(
                "guidance_scale was raised above 1 by a callback, but the call began without guidance and has no null "
                "condition; begin it with a guidance_scale above 1"
            )
        return self.null_condition


def is_discrete(model: Any) -> bool:
    """Whether a generator counts time in the integer steps of a DDPM."""
    return getattr(model, "discrete_time", False)


def learns_variance(scheduler: Any) -> bool:
    """Whether a scheduler takes the variance that a model predicts after the noise."""
    return str(scheduler.config.get("variance_type")).startswith("learned")


def class_token_dim(model: Any) -> int:
    """Width of the class token that a generator denoises beside the latents; 0 for none."""
    return model.config.get("class_token_dim") or 0

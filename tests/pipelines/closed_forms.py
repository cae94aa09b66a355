"""Generators whose prediction is a formula, so that a sampler's end point can be computed by other means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from repagen import ClassToImagePipeline

Field = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x (B, C, h, w), t or step, labels (B,)) => prediction; must compute in the dtype of x."""

NULL_LABEL = 1000


def golden_field(x: torch.Tensor, t: Any, labels: torch.Tensor) -> torch.Tensor:
    """The velocity of the golden procedures, elementwise."""
    offset = 0.1 * (labels.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) + 1) / 11
    t = torch.as_tensor(t).to(x.dtype)
    return 0.7 * x * torch.cos(2 * t) - 0.3 * torch.sin(3 * x + t) + offset


def random_field(seed: int) -> Field:
    """A smooth velocity that mixes channels and neighbours and depends on the class, with coefficients drawn."""
    a, b, c, d = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()

    def field(x: torch.Tensor, t: Any, labels: torch.Tensor) -> torch.Tensor:
        y = labels.to(x.dtype).reshape(-1, 1, 1, 1) / NULL_LABEL
        t = torch.as_tensor(t).to(x.dtype)
        mixed = x.roll(1, dims=1) + x.roll(1, dims=3)
        return (0.5 + a) * torch.tanh(mixed + t) - 0.4 * b * x * t + c * torch.cos(4 * y + x) + d * y

    return field


def entangled_field(
    x: torch.Tensor, token: torch.Tensor, t: Any, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Velocities of latents and of a class token, each depending on the other."""
    latents = golden_field(x, t, labels) + token.mean(dim=1).reshape(-1, 1, 1, 1)
    return latents, golden_field(token, t, labels) - x.mean(dim=(1, 2, 3))[:, None]


class FormulaTransformer(ModelMixin, ConfigMixin, CacheMixin):
    """Calls formulas in place of a network; `base` is that of its base head."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 4,
        num_classes: int = NULL_LABEL,
        class_dropout_prob: float = 0.1,
        prediction_type: str = "velocity",
        learn_sigma: bool = True,
        discrete_time: bool = False,
        has_base_head: bool = False,
        class_token_dim: int = 0,
    ) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # gives the model a dtype and a device
        self.discrete_time, self.has_base_head = discrete_time, has_base_head
        self.latent_shape = (in_channels, sample_size, sample_size)
        self.formula: Field = golden_field
        self.base: Field = golden_field
        self.token_formula: Any = entangled_field
        self.times: list[float] = []
        self.evaluated = 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        return_base: bool = False,
        class_token: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        assert timestep.shape == class_labels.shape == hidden_states.shape[:1]
        self.times.append(timestep[0].item())
        self.evaluated += len(hidden_states)
        if class_token is not None:
            return self.token_formula(hidden_states, class_token, timestep[0], class_labels)
        formulas = (self.formula, self.base) if return_base else (self.formula,)
        return tuple(formula(hidden_states, timestep[0], class_labels) for formula in formulas)


def formula_pipeline(scheduler: Any, formula: Field, **config: Any) -> ClassToImagePipeline:
    transformer = FormulaTransformer(**config)
    transformer.formula = formula
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=transformer.config.in_channels,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipe = ClassToImagePipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe

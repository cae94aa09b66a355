"""The DiT/SiT transformer over latents (Peebles & Xie 2023, Ma et al. 2024), also in REPA's form (Yu et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FasterCacheConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from repagen.errors import UserError
from repagen.layers.embeddings import SinusoidalTimeEmbedding
from repagen.layers.latent_transformer import DIT_SIZES, TimeDirection, zero_
from repagen.layers.lora import apply_lora_scale
from repagen.layers.modulated import ModulatedBlock, modulate, modulation_parameters
from repagen.layers.single_stack import SingleStackMixin


@dataclass
class SiTTransformerOutput(Transformer2DModelOutput):
    """Predictions for the latent (B, C, h, w) and, where there is one, for the class token (B, class_token_dim)."""

    class_token: torch.Tensor | None = None


class SiTTransformer2DModel(  # type: ignore[misc]  # diffusers' own bases disagree about attributes
    SingleStackMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """Class-conditional transformer with adaptive norms over patches of a latent.

    Call `initialize_weights` before training from scratch. The residual stream, norms and time embedding are float32
    in every precision.

    Args:
        sample_size: height and width of the latent, one number for a square. Fixed: the model has one position table.
        patch_size: side of a patch; published are 1, 2, 4 and 8.
        in_channels: channels C of the latent.
        hidden_size: width of a token.
        depth: number of blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the feed-forward part over `hidden_size`.
        num_classes: classes; 0 for an unconditional model, which ignores `class_labels`.
        class_dropout_prob: share of training labels the trainer replaces by the null label `num_classes`; above 0 the
            class table has a null row, and the model can be guided. The model itself drops nothing.
        learn_sigma: the network puts out 2C channels, of which the second half is unused (official SiT checkpoints).
        qk_norm: affine LayerNorm of queries and keys.
        prediction_type: what the output is: "velocity" (noise - data), "sample" or "epsilon".
        time_direction: how the network inside counts time; the outside is always t = 0 for data (see `TimeDirection`).
        class_token_dim: width of an encoder's class token that the model denoises beside the latent (REG, Wu et al.
            2025, arXiv 2507.01467); 0: none.
    """

    _sizes: ClassVar[dict[str, dict[str, int]]] = DIT_SIZES

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        qk_norm: bool = False,
        prediction_type: Literal["velocity", "sample", "epsilon"] = "velocity",
        time_direction: TimeDirection = "data_at_zero",
        class_token_dim: int = 0,
    ) -> None:
        super().__init__()
        self._build_stack(
            SinusoidalTimeEmbedding(hidden_size),
            (
                ModulatedBlock(hidden_size, num_heads, mlp_ratio, qk_norm="layer" if qk_norm else None)
                for _ in range(depth)
            ),
            out_channels=in_channels * (2 if learn_sigma else 1),
        )
        # REG's noisy class token is a token of its own without position; its output shares the last modulated norm.
        self.class_token_in = nn.Linear(class_token_dim, hidden_size) if class_token_dim else None
        self.class_token_out = nn.Linear(hidden_size, class_token_dim) if class_token_dim else None

    def initialize_weights(self) -> None:
        """Draw the published initial weights, as the training program does; the model then predicts exactly 0."""
        super().initialize_weights()
        if self.class_token_out is not None:
            zero_(self.class_token_out)

    def enable_cache(self, config: Any) -> None:
        """Cache parts of the network between sampling steps, with one of diffusers' cache configs.

        Raises:
            UserError: FasterCache and TaylorSeer's lite mode, where the model denoises a class token: they extrapolate
                one prediction, not two.
        """
        one_prediction = isinstance(config, FasterCacheConfig) or getattr(config, "use_lite_mode", False)
        if self.config.class_token_dim and one_prediction:
            raise UserError(
                f"{type(config).__name__}: not for a model with class_token_dim, whose predictions are two; take "
                "another, or TaylorSeer without use_lite_mode"
            )
        super().enable_cache(config)

    @apply_lora_scale
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        class_token: torch.Tensor | None = None,
    ) -> SiTTransformerOutput | tuple[torch.Tensor, ...]:
        """Predict from a noisy latent.

        Args:
            hidden_states: x_t, (B, C, h, w).
            timestep: t in [0, 1], 0 = data, 1 = noise; (B,), or one number for all.
            class_labels: (B,) integers in [0, num_classes), or num_classes for no class where there is a null row.
            attention_kwargs: {"scale": float} scales LoRA layers.
            return_dict: an output object, else a tuple.
            class_token: noisy class token at the same t, (B, class_token_dim); of a model with class_token_dim only.

        Returns:
            `sample` (B, C, h, w) and, with class_token_dim, `class_token` (B, class_token_dim), in the dtype of
            `hidden_states`, in the prediction type of the config.

        Raises:
            UserError: (a ValueError) a latent of another size, a time, a class or a class token that is none.
        """
        self._check_latents(hidden_states)
        self._check_class_token(class_token, hidden_states.shape[0])
        network_time = self._network_time(timestep, hidden_states.shape[0])
        if class_token is None or self.class_token_in is None:
            tokens, conditioning = self._network(hidden_states, network_time, class_labels)
            sample = self._predict(tokens, conditioning, hidden_states)
            return SiTTransformerOutput(sample=sample) if return_dict else (sample,)
        appended = self.class_token_in(class_token.to(self._matmul_dtype))[:, None]
        tokens, conditioning = self._network(hidden_states, network_time, class_labels, appended)
        sample = self._predict(tokens[:, :-1], conditioning, hidden_states)
        token = self._predict_class_token(tokens[:, -1:], conditioning, hidden_states.dtype)
        return SiTTransformerOutput(sample=sample, class_token=token) if return_dict else (sample, token)

    def _check_class_token(self, class_token: torch.Tensor | None, batch_size: int) -> None:
        width = self.config.class_token_dim
        if class_token is None and not width:
            return
        given = "none" if class_token is None else f"shape {tuple(class_token.shape)}"
        expected = f"one of shape ({batch_size}, {width})" if width else "none, its class_token_dim is 0"
        if class_token is None or not width or tuple(class_token.shape) != (batch_size, width):
            raise UserError(f"class_token: this model takes {expected}; got {given}")

    def _predict_class_token(
        self, token: torch.Tensor, conditioning: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Final layer of the class token: (B, 1, hidden_size) => (B, class_token_dim) of `dtype`."""
        assert self.class_token_out is not None
        shift, scale = modulation_parameters(self.modulation_out, conditioning, 2)
        prediction = self.class_token_out(modulate(self.norm_out(token), shift, scale).to(conditioning.dtype))[:, 0]
        return self._library_direction(prediction.to(dtype))

"""The DiT/SiT transformer over latents (Peebles & Xie 2023, Ma et al. 2024), also in REPA's form (Yu et al. 2025)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import nn

from repagen.layers.embeddings import LabelEmbedding, PatchEmbedding, SinusoidalTimeEmbedding, sincos_position_table
from repagen.layers.latent_transformer import LatentTransformerMixin, TimeDirection, grid_of, xavier_, zero_
from repagen.layers.modulated import ModulatedBlock, make_norm


class SiTTransformer2DModel(  # type: ignore[misc]  # diffusers' own bases disagree about attributes
    LatentTransformerMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
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
    """

    _sizes: ClassVar[dict[str, dict[str, int]]] = {
        "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
        "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    }

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
    ) -> None:
        super().__init__()
        self.token_grid = grid_of(sample_size, patch_size)
        self.patch_embed = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.register_buffer("pos_embed", sincos_position_table(self.token_grid, hidden_size))
        self.time_embedder = SinusoidalTimeEmbedding(hidden_size)
        null_row = class_dropout_prob > 0
        self.label_embedder = LabelEmbedding(num_classes, hidden_size, null_row) if num_classes + null_row else None
        self.blocks = nn.ModuleList(
            ModulatedBlock(hidden_size, num_heads, mlp_ratio, qk_norm="layer" if qk_norm else None)
            for _ in range(depth)
        )
        self.norm_out = make_norm(hidden_size, "layer")
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        self.gradient_checkpointing = False

    def initialize_weights(self) -> None:
        """Draw the published initial weights, as the training program does; the model then predicts exactly 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                xavier_(module)
        for linear in (self.time_embedder.linear_1, self.time_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.label_embedder is not None:
            nn.init.normal_(self.label_embedder.table.weight, std=0.02)
        zero_(self.modulation_out, self.proj_out, *(block.modulation for block in self.blocks))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict from a noisy latent.

        Args:
            hidden_states: x_t, (B, C, h, w).
            timestep: t in [0, 1], 0 = data, 1 = noise; (B,), or one number for all.
            class_labels: (B,) integers in [0, num_classes), or num_classes for no class where there is a null row.
            attention_kwargs: {"scale": float} scales LoRA layers.
            return_dict: an output object, else a tuple.

        Returns:
            `sample` (B, C, h, w) in the dtype of `hidden_states`, in the prediction type of the config.

        Raises:
            UserError: (a ValueError) a latent of another size, a time or a class that is none.
        """
        self._check_latents(hidden_states)
        conditioning = self.time_embedder(self._network_time(timestep, hidden_states.shape[0]))
        if self.label_embedder is not None:
            conditioning = conditioning + self.label_embedder(class_labels, like=hidden_states)
        conditioning = conditioning.to(self._matmul_dtype)
        tokens = self.patch_embed(hidden_states).float() + self.pos_embed.float()
        tokens = self._run_blocks(self.blocks, tokens, conditioning)
        sample = self._predict(tokens, conditioning, hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

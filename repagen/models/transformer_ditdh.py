"""DiT^DH, the diffusion transformer with a shallow wide head, of RAE (Zheng et al. 2025, section 5)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from repagen.layers.embeddings import FourierTimeEmbedding, LabelEmbedding, PatchEmbedding, sincos_position_table
from repagen.layers.latent_transformer import (
    DIT_SIZES,
    LatentTransformerMixin,
    TimeDirection,
    grid_of,
    zero_,
)
from repagen.layers.modulated import FeedForwardKind, HeadBlock, ModulatedBlock, NormKind, make_norm
from repagen.layers.rope import RotaryTable

_HEAD = {"head_hidden_size": 2048, "head_depth": 2, "head_num_heads": 16}


class DiTDHTransformer2DModel(  # type: ignore[misc]  # diffusers' own bases disagree about attributes
    LatentTransformerMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """Class-conditional transformer over latents whose last blocks are as wide as the latent has channels, or wider.

    A deep narrow part (`blocks`) turns latent, time and class into one condition per token; a shallow wide part
    (`head_blocks`), modulated by it token by token, predicts from the latent. A velocity loss cannot fall below what a
    width under the latent's channel count leaves (RAE, theorem 1), hence the wide head.

    Call `initialize_weights` before training from scratch. The residual stream, norms and time embedding are float32
    in every precision.

    Args:
        sample_size: height and width of the latent, one number for a square. Fixed: the model has position tables.
        patch_size: side of a patch, 1 as published.
        in_channels: channels C of the latent.
        hidden_size: width of the deep part.
        depth: blocks of the deep part.
        num_heads: attention heads of the deep part.
        head_hidden_size: width of the head.
        head_depth: blocks of the head.
        head_num_heads: attention heads of the head.
        mlp_ratio: hidden width of the feed-forward parts over the width, times 2/3 for SwiGLU.
        num_classes: classes; 0 for an unconditional model, which ignores `class_labels`.
        class_dropout_prob: share of training labels the trainer replaces by the null label `num_classes`; above 0 the
            class table has a null row, and the model can be guided. The model itself drops nothing.
        qk_norm: norm of queries and keys: RMSNorm, or affine LayerNorm without `use_rmsnorm`.
        use_swiglu: SwiGLU feed-forward, else GELU.
        use_rope: rotary positions in both parts.
        use_rmsnorm: RMSNorm, else LayerNorm without affine.
        use_pos_embed: sine-cosine positions added in the deep part.
        prediction_type: what the output is: "velocity" (noise - data), "sample" or "epsilon".
        time_direction: how the network inside counts time; the outside is always t = 0 for data (see `TimeDirection`).
    """

    _sizes: ClassVar[dict[str, dict[str, int]]] = {name: {**size, **_HEAD} for name, size in DIT_SIZES.items()}

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 768,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        head_hidden_size: int = 2048,
        head_depth: int = 2,
        head_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        use_pos_embed: bool = True,
        prediction_type: Literal["velocity", "sample", "epsilon"] = "velocity",
        time_direction: TimeDirection = "data_at_zero",
    ) -> None:
        super().__init__()
        self.token_grid = grid_of(sample_size, patch_size)
        self.patch_embed = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.head_patch_embed = PatchEmbedding(in_channels, head_hidden_size, patch_size)
        self.register_buffer(
            "pos_embed", sincos_position_table(self.token_grid, hidden_size) if use_pos_embed else None
        )
        self.rope = RotaryTable(self.token_grid, hidden_size // num_heads) if use_rope else None
        self.head_rope = RotaryTable(self.token_grid, head_hidden_size // head_num_heads) if use_rope else None
        self.time_embedder = FourierTimeEmbedding(hidden_size)
        null_row = class_dropout_prob > 0
        self.label_embedder = LabelEmbedding(num_classes, hidden_size, null_row) if num_classes + null_row else None

        norm: NormKind = "rms" if use_rmsnorm else "layer"
        feed_forward: FeedForwardKind = "swiglu" if use_swiglu else "gelu"

        kinds = (mlp_ratio, norm, feed_forward, norm if qk_norm else None)
        self.blocks = nn.ModuleList(ModulatedBlock(hidden_size, num_heads, *kinds) for _ in range(depth))
        self.condition_proj = nn.Linear(hidden_size, head_hidden_size) if hidden_size != head_hidden_size else None
        # Apart from `blocks`: diffusers' caches may skip the deep part between steps, never the head.
        self.head_blocks = nn.ModuleList(
            HeadBlock(head_hidden_size, head_num_heads, *kinds) for _ in range(head_depth)
        )
        self.norm_out = make_norm(head_hidden_size, norm)
        self.modulation_out = nn.Linear(head_hidden_size, 2 * head_hidden_size)
        self.proj_out = nn.Linear(head_hidden_size, patch_size**2 * in_channels)
        self.gradient_checkpointing = False

    def initialize_weights(self) -> None:
        """Draw the published initial weights, as the training program does; the model then predicts exactly 0."""
        # Other linear layers keep PyTorch's own initialisation, as in the official code.
        self._initialize_embeddings(self.patch_embed.proj, self.head_patch_embed.proj)
        modulations = (block.modulation for block in (*self.blocks, *self.head_blocks))
        zero_(self.modulation_out, self.proj_out, *modulations)

    def _network(
        self, hidden_states: torch.Tensor, network_time: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        condition = self._condition(hidden_states, self.time_embedder(network_time), class_labels)
        condition = condition.to(self._matmul_dtype)
        tokens = self.head_patch_embed(hidden_states).float()
        return self._run_blocks(self.head_blocks, tokens, condition, self.head_rope), condition

    def _condition(
        self, hidden_states: torch.Tensor, time: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The deep part: one condition per token, (B, N, head_hidden_size)."""
        conditioning = time
        if self.label_embedder is not None:
            conditioning = conditioning + self.label_embedder(class_labels, like=hidden_states)
        tokens = self.patch_embed(hidden_states).float()
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed.float()
        # Every modulation applies SiLU once more: the official network has both.
        conditioning = F.silu(conditioning).to(self._matmul_dtype)
        tokens = self._run_blocks(self.blocks, tokens, conditioning, self.rope)
        condition = F.silu(time[:, None] + tokens)
        return condition if self.condition_proj is None else self.condition_proj(condition.to(self._matmul_dtype))

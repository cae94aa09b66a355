"""DDT, the decoupled diffusion transformer (Wang et al. 2025, arXiv 2504.05741), from which DiT^DH took its head."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from repagen.layers.embeddings import LabelEmbedding, PatchEmbedding, SinusoidalTimeEmbedding
from repagen.layers.latent_transformer import LatentTransformerMixin, TimeDirection, grid_of, zero_
from repagen.layers.modulated import HeadBlock, ModulatedBlock, make_norm
from repagen.layers.rope import rotary_table


class DDTTransformer2DModel(  # type: ignore[misc]  # diffusers' own bases disagree about attributes
    LatentTransformerMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """Class-conditional transformer of an encoder and a decoder of one width.

    The encoder (`blocks`), modulated by time and class, turns the latent into one condition per token; the decoder
    (`head_blocks`), modulated by it, predicts from the latent. Their blocks have RMSNorm, also of queries and keys,
    SwiGLU without bias, and rotary positions that span 0 to 16 in each direction whatever the grid: the model takes
    latents of any size.

    Call `initialize_weights` before training from scratch. The residual stream, norms and time embedding are float32
    in every precision.

    Args:
        sample_size: height and width of the latent that a pipeline draws, one number for a square.
        patch_size: side of a patch, 2 as published.
        in_channels: channels C of the latent.
        hidden_size: width of a token.
        depth: blocks of the encoder.
        num_heads: attention heads per block.
        head_depth: blocks of the decoder.
        mlp_ratio: hidden width of the feed-forward parts over 2/3 of the width.
        num_classes: classes; 0 for an unconditional model, which ignores `class_labels`.
        class_dropout_prob: share of training labels the trainer replaces by the null label `num_classes`; above 0 the
            class table has a null row, and the model can be guided. The model itself drops nothing.
        prediction_type: what the output is: "velocity" (noise - data), "sample" or "epsilon".
        time_direction: how the network inside counts time; the outside is always t = 0 for data (see `TimeDirection`).
    """

    any_size = True
    _sizes: ClassVar[dict[str, dict[str, int]]] = {
        "XL": {"hidden_size": 1152, "depth": 22, "num_heads": 16, "head_depth": 6},
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 22,
        num_heads: int = 16,
        head_depth: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        prediction_type: Literal["velocity", "sample", "epsilon"] = "velocity",
        time_direction: TimeDirection = "data_at_zero",
    ) -> None:
        super().__init__()
        self.token_grid = grid_of(sample_size, patch_size)
        self.patch_embed = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.head_patch_embed = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.time_embedder = SinusoidalTimeEmbedding(hidden_size, max_period=10.0)
        null_row = class_dropout_prob > 0
        self.label_embedder = LabelEmbedding(num_classes, hidden_size, null_row) if num_classes + null_row else None

        def make(block: type[ModulatedBlock]) -> ModulatedBlock:
            return block(hidden_size, num_heads, mlp_ratio, "rms", "swiglu", "rms", bias=False)

        self.blocks = nn.ModuleList(make(ModulatedBlock) for _ in range(depth))
        # Apart from `blocks`: diffusers' caches may skip the encoder between steps, never the decoder.
        self.head_blocks = nn.ModuleList(make(HeadBlock) for _ in range(head_depth))
        self.norm_out = make_norm(hidden_size, "layer")
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.gradient_checkpointing = False

    def initialize_weights(self) -> None:
        """Draw the published initial weights, as the training program does; the model then predicts exactly 0."""
        # Other linear layers, those of the blocks' modulation too, keep PyTorch's initialisation, as in the official
        # code.
        self._initialize_embeddings(self.patch_embed.proj, self.head_patch_embed.proj)
        zero_(self.modulation_out, self.proj_out)

    def _network(
        self, hidden_states: torch.Tensor, network_time: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        time = self.time_embedder(network_time)
        # Every modulation applies SiLU to its condition; the official network does so once, before the blocks.
        conditioning = time
        if self.label_embedder is not None:
            conditioning = conditioning + self.label_embedder(class_labels, like=hidden_states)
        rope = self._rope(hidden_states)
        tokens = self.patch_embed(hidden_states).float()
        tokens = self._run_blocks(self.blocks, tokens, conditioning.to(self._matmul_dtype), rope)
        condition = (time[:, None] + tokens).to(self._matmul_dtype)
        tokens = self.head_patch_embed(hidden_states).float()
        return self._run_blocks(self.head_blocks, tokens, condition, rope), condition

    def _rope(self, latents: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        config = self.config
        grid = grid_of((latents.shape[2], latents.shape[3]), config.patch_size)
        head_dim = config.hidden_size // config.num_heads
        table = rotary_table(grid, head_dim, extent=16.0, alternating=True, device=latents.device)
        return lambda: table

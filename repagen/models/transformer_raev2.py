"""DiT^DH of RAEv2 (arXiv 2605.18324): conditions as tokens, x-prediction, and a second, early head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from repagen.errors import UserError
from repagen.layers.embeddings import FourierTimeEmbedding, LabelEmbedding, PatchEmbedding
from repagen.layers.in_context import InContextBlock
from repagen.layers.latent_transformer import TimeDirection, grid_of, zero_
from repagen.layers.lora import apply_lora_scale
from repagen.layers.modulated import HeadBlock, modulate, modulation_parameters
from repagen.layers.norms import RMSNorm
from repagen.layers.rope import RotaryTable
from repagen.layers.text_conditioning import TextConditioning, TextTokens
from repagen.layers.text_transformer import TextTransformerMixin

_SKIP_BLOCKS = (FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig)


@dataclass
class RAEv2TransformerOutput(Transformer2DModelOutput):
    """Predictions (B, C, h, w) of the whole network and, where asked for, of the base head."""

    base_sample: torch.Tensor | None = None


class BaseHead(nn.Module):
    """Output layer of the first blocks, modulated token by token by its own input: (B, N, dim) => (B, N, out_dim)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm_out = RMSNorm(dim)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, out_dim)

    def forward(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Predict from tokens (B, N, dim) float32, with matrix products in `dtype`."""
        shift, scale = modulation_parameters(self.modulation_out, tokens.to(dtype), 2)
        return self.proj_out(modulate(self.norm_out(tokens), shift, scale).to(dtype))


class RAEv2Transformer2DModel(  # type: ignore[misc]  # diffusers' own bases disagree about attributes
    TextTransformerMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """DiT^DH that reads time and class or text from tokens of its own and can predict from its first blocks.

    The deep narrow part (`blocks`) has no modulation: `num_time_tokens` learned tokens plus the time embedding and
    `num_class_tokens` learned tokens plus the class embedding follow the image tokens, without positions. Of a text,
    its tokens stand in place of the latter, or `num_class_tokens` learned ones for the absent prompt. The image
    tokens, plus the time, condition the shallow wide head (`head_blocks`) token by token, as in DiT^DH. A second
    output layer after block `base_depth` predicts the same target; trained beside the first, it is RAEv2's alignment,
    and guides it in sampling at the price of one pass: base + scale * (whole - base).

    Call `initialize_weights` before training from scratch. The residual stream, norms and time embedding are float32
    in every precision.

    Args:
        sample_size: height and width of the latent, one number for a square. Fixed without text: the model
            has position tables.
        patch_size: side of a patch, 1 as published.
        in_channels: channels C of the latent.
        hidden_size: width of the deep part.
        depth: blocks of the deep part.
        num_heads: attention heads of the deep part.
        head_hidden_size: width of the head.
        head_depth: blocks of the head.
        head_num_heads: attention heads of the head.
        base_depth: block of the deep part (the first is 1) after which the base head predicts.
        num_time_tokens: tokens that carry the time.
        num_class_tokens: tokens that carry the class, or that stand for an absent prompt; with cross-attention, tokens
            that carry nothing.
        mlp_ratio: hidden width of the feed-forward parts over 2/3 of the width.
        num_classes: classes; 0 for a model without, which ignores `class_labels`. None: 1000, or 0 with text.
        class_dropout_prob: share of training labels the trainer replaces by the null label `num_classes`; above 0 the
            class table has a null row, and the model can be guided. The model itself drops nothing.
        prediction_type: what both heads put out: "sample" as published, "velocity" (noise - data) or "epsilon".
        time_direction: how the network inside counts time; the outside is always t = 0 for data (see `TimeDirection`).
        text_dim: width of the text embeddings in place of classes; 0: takes no text. A model that takes text takes
            latents of any size, too.
        text_conditioning: how the deep part reads text: "in_context", its tokens follow the image tokens, without
            positions, or "cross_attention", a further attention in every block. The head sees image tokens only.
        text_dropout_prob: share of prompts the trainer leaves out; above 0 there is a learned stand-in for the absent
            prompt, and the model can be guided. The model itself drops nothing.

    Raises:
        UserError: `base_depth` is no block of the deep part; both classes and text.
    """

    has_base_head: ClassVar[bool] = True
    _sizes: ClassVar[dict[str, dict[str, int]]] = {
        "XL": {
            "hidden_size": 1440,
            "depth": 28,
            "num_heads": 20,
            "head_hidden_size": 2048,
            "head_depth": 2,
            "head_num_heads": 16,
        },
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 1024,
        hidden_size: int = 1440,
        depth: int = 28,
        num_heads: int = 20,
        head_hidden_size: int = 2048,
        head_depth: int = 2,
        head_num_heads: int = 16,
        base_depth: int = 8,
        num_time_tokens: int = 4,
        num_class_tokens: int = 8,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        prediction_type: Literal["velocity", "sample", "epsilon"] = "sample",
        time_direction: TimeDirection = "data_at_zero",
        text_dim: int = 0,
        text_conditioning: TextConditioning = "in_context",
        text_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        num_classes = self._classes_or_text(num_classes, text_dim)
        if not 1 <= base_depth <= depth:
            raise UserError(f"base_depth {base_depth} is no block of the deep part; allowed are 1..{depth}")
        self.token_grid = grid_of(sample_size, patch_size)
        self.patch_embed = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.head_patch_embed = PatchEmbedding(in_channels, head_hidden_size, patch_size)
        across, in_context = self._reads_across, self._reads_in_context
        num_conditions = num_time_tokens + (0 if in_context else num_class_tokens)
        self.rope = RotaryTable(self.token_grid, hidden_size // num_heads, num_conditions)
        self.head_rope = RotaryTable(self.token_grid, head_hidden_size // head_num_heads)
        self.time_embedder = FourierTimeEmbedding(hidden_size)
        null_row = class_dropout_prob > 0 and not text_dim
        self.label_embedder = LabelEmbedding(num_classes, hidden_size, null_row) if num_classes + null_row else None
        self.time_tokens = nn.Parameter(torch.randn(num_time_tokens, hidden_size) * hidden_size**-0.5)
        self.class_tokens = (
            None if in_context else nn.Parameter(torch.randn(num_class_tokens, hidden_size) * hidden_size**-0.5)
        )

        self.blocks = nn.ModuleList(InContextBlock(hidden_size, num_heads, mlp_ratio, across) for _ in range(depth))
        self.base_head = BaseHead(hidden_size, patch_size**2 * in_channels)
        self.condition_proj = nn.Linear(hidden_size, head_hidden_size) if hidden_size != head_hidden_size else None
        # Apart from `blocks`: diffusers' caches may skip the deep part between steps, never the head.
        self.head_blocks = nn.ModuleList(
            HeadBlock(head_hidden_size, head_num_heads, mlp_ratio, "rms", "swiglu", "rms") for _ in range(head_depth)
        )
        self.norm_out = RMSNorm(head_hidden_size)
        self.modulation_out = nn.Linear(head_hidden_size, 2 * head_hidden_size)
        self.proj_out = nn.Linear(head_hidden_size, patch_size**2 * in_channels)
        self._build_text(num_null_tokens=1 if across else num_class_tokens, pooled=False)
        self.gradient_checkpointing = False

    def initialize_weights(self) -> None:
        """Draw the published initial weights, as the training program does; both heads then predict exactly 0."""
        # Other linear layers keep PyTorch's own initialisation, as in the official code.
        self._initialize_embeddings(self.patch_embed.proj, self.head_patch_embed.proj)
        for tokens in (self.time_tokens, self.class_tokens):
            if tokens is not None:
                nn.init.normal_(tokens, std=self.config.hidden_size**-0.5)
        zero_(*(block.modulation for block in self.head_blocks))
        zero_(self.modulation_out, self.proj_out, self.base_head.modulation_out, self.base_head.proj_out)
        self._initialize_text()

    @apply_lora_scale
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        return_base: bool = False,
    ) -> RAEv2TransformerOutput | tuple[torch.Tensor, ...]:
        """Predict from a noisy latent.

        Args:
            hidden_states: x_t, (B, C, h, w).
            timestep: t in [0, 1], 0 = data, 1 = noise; (B,), or one number for all.
            class_labels: (B,) integers in [0, num_classes), or num_classes for no class where there is a null row.
            encoder_hidden_states: text embeddings (B, L, text_dim), in a model that takes text.
            encoder_attention_mask: (B, L) bool, True for real tokens; a row of False is an absent prompt. None: all
                tokens are real.
            attention_kwargs: {"scale": float} scales LoRA layers.
            return_dict: an output object, else a tuple.
            return_base: also predict by the base head.

        Returns:
            `sample` and, with `return_base`, `base_sample`, each (B, C, h, w) in the dtype of `hidden_states`, in the
            prediction type of the config.

        Raises:
            UserError: (a ValueError) a latent of another size, a time or a class that is none, text that does not
                fit or is missing, padding under an attention backend that takes no mask; `return_base` under a cache
                that skips blocks, after which the base head has nothing to predict from.
        """
        self._check_latents(hidden_states)
        lite = getattr(self._cache_config, "use_lite_mode", False)  # TaylorSeer's: blocks return zeros
        if return_base and (lite or isinstance(self._cache_config, _SKIP_BLOCKS)):
            raise UserError(
                f"return_base: {type(self._cache_config).__name__} skips the blocks that the base head predicts from; "
                "call disable_cache(), or take a cache that keeps them (pyramid attention broadcast, TaylorSeer "
                "without use_lite_mode)"
            )
        time = self.time_embedder(self._network_time(timestep, hidden_states.shape[0]))
        text = self._embed_text(encoder_hidden_states, encoder_attention_mask, hidden_states.shape[0])
        early, deep = self._deep_tokens(hidden_states, time, class_labels, text)
        sample = self._head(hidden_states, F.silu(time[:, None] + deep))
        if not return_base:
            return RAEv2TransformerOutput(sample=sample) if return_dict else (sample,)
        base_tokens = self.base_head(F.silu(time[:, None] + early), self._matmul_dtype)
        base_sample = self._to_latents(base_tokens, hidden_states)
        if return_dict:
            return RAEv2TransformerOutput(sample=sample, base_sample=base_sample)
        return sample, base_sample

    def _deep_tokens(
        self,
        hidden_states: torch.Tensor,
        time: torch.Tensor,
        class_labels: torch.Tensor | None,
        text: TextTokens | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Image tokens (B, N, hidden_size) after block `base_depth` and after the last block of the deep part."""
        image = self.patch_embed(hidden_states).float()
        num_image_tokens = image.shape[1]
        parts = [image, self.time_tokens.float() + time[:, None]]
        if self.class_tokens is not None:
            classes = self.class_tokens.float().expand(image.shape[0], -1, -1)
            if self.label_embedder is not None:
                classes = classes + self.label_embedder(class_labels, like=hidden_states)[:, None]
            parts.append(classes)
        conditioned = torch.cat(parts, dim=1)
        tokens, reading = self._with_text(conditioned, text)
        rope = self._rope(self.rope, hidden_states, tokens.shape[1] - conditioned.shape[1])
        depth = self.config.base_depth
        early = self._run_blocks(self.blocks[:depth], tokens, self._matmul_dtype, rope, **reading)
        deep = self._run_blocks(self.blocks[depth:], early, self._matmul_dtype, rope, **reading)
        return early[:, :num_image_tokens], deep[:, :num_image_tokens]

    def _head(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The wide part's prediction (B, C, h, w) under one condition per token (B, N, hidden_size)."""
        condition = condition.to(self._matmul_dtype)
        if self.condition_proj is not None:
            condition = self.condition_proj(condition)
        tokens = self.head_patch_embed(hidden_states).float()
        rope = self._rope(self.head_rope, hidden_states)
        tokens = self._run_blocks(self.head_blocks, tokens, condition.to(self._matmul_dtype), rope)
        return self._predict(tokens, condition, hidden_states)

    def _start_from(self, origin: Self, null_class: torch.Tensor) -> None:
        # The tables of the origin, which may have been loaded, without the rows of its class tokens.
        for own, others in ((self.rope.cos, origin.rope.cos), (self.rope.sin, origin.rope.sin)):
            own.copy_(others[: len(own)])
        assert origin.class_tokens is not None
        start = origin.class_tokens + null_class
        if self.class_tokens is not None:
            self.class_tokens.copy_(start)
        elif self.text_embedder is not None:
            self.text_embedder.start_from(null_tokens=start, pooled=None)

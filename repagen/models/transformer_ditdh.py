"""DiT^DH, the diffusion transformer with a shallow wide head, of RAE (Zheng et al. 2025, section 5)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from repagen.layers.embeddings import (
    FourierTimeEmbedding,
    LabelEmbedding,
    PatchEmbedding,
    other_sincos_table,
    sincos_position_table,
)
from repagen.layers.latent_transformer import DIT_SIZES, TimeDirection, grid_of, zero_
from repagen.layers.lora import apply_lora_scale
from repagen.layers.modulated import FeedForwardKind, HeadBlock, ModulatedBlock, NormKind, make_norm
from repagen.layers.positions import cached
from repagen.layers.rope import RotaryTable
from repagen.layers.text_conditioning import TextConditioning, TextTokens
from repagen.layers.text_transformer import TextTransformerMixin

_HEAD = {"head_hidden_size": 2048, "head_depth": 2, "head_num_heads": 16}


class DiTDHTransformer2DModel(  # type: ignore[misc]  # diffusers' own bases disagree about attributes
    TextTransformerMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin, AttentionMixin
):
    """Class- or text-conditional transformer whose last blocks are as wide as the latent has channels, or wider.

    A deep narrow part (`blocks`) turns latent, time and class or text into one condition per token; a shallow wide
    part (`head_blocks`), modulated by it token by token, predicts from the latent. A velocity loss cannot fall below
    what a width under the latent's channel count leaves (RAE, theorem 1), hence the wide head. Text is read token by
    token, and pooled it modulates as the class embedding does.

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
        mlp_ratio: hidden width of the feed-forward parts over the width, times 2/3 for SwiGLU.
        num_classes: classes; 0 for a model without, which ignores `class_labels`. None: 1000, or 0 with text.
        class_dropout_prob: share of training labels the trainer replaces by the null label `num_classes`; above 0 the
            class table has a null row, and the model can be guided. The model itself drops nothing.
        qk_norm: norm of queries and keys: RMSNorm, or affine LayerNorm without `use_rmsnorm`.
        use_swiglu: SwiGLU feed-forward, else GELU.
        use_rope: rotary positions in both parts.
        use_rmsnorm: RMSNorm, else LayerNorm without affine.
        use_pos_embed: sine-cosine positions added in the deep part.
        prediction_type: what the output is: "velocity" (noise - data), "sample" or "epsilon".
        time_direction: how the network inside counts time; the outside is always t = 0 for data (see `TimeDirection`).
        text_dim: width of the text embeddings in place of classes; 0: takes no text. A model that takes text takes
            latents of any size, too.
        text_conditioning: how the deep part reads text: "in_context", its tokens follow the image tokens, without
            positions, or "cross_attention", a further attention in every block. The head sees image tokens only.
        text_dropout_prob: share of prompts the trainer leaves out; above 0 there is a learned stand-in for the absent
            prompt, and the model can be guided. The model itself drops nothing.

    Raises:
        UserError: both classes and text.
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
        num_classes: int | None = None,
        class_dropout_prob: float = 0.1,
        qk_norm: bool = False,
        use_swiglu: bool = True,
        use_rope: bool = True,
        use_rmsnorm: bool = True,
        use_pos_embed: bool = True,
        prediction_type: Literal["velocity", "sample", "epsilon"] = "velocity",
        time_direction: TimeDirection = "data_at_zero",
        text_dim: int = 0,
        text_conditioning: TextConditioning = "in_context",
        text_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        num_classes = self._classes_or_text(num_classes, text_dim)
        self.token_grid = grid_of(sample_size, patch_size)
        self.patch_embed = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.head_patch_embed = PatchEmbedding(in_channels, head_hidden_size, patch_size)
        self.register_buffer(
            "pos_embed", sincos_position_table(self.token_grid, hidden_size) if use_pos_embed else None
        )
        self.rope = RotaryTable(self.token_grid, hidden_size // num_heads) if use_rope else None
        self.head_rope = RotaryTable(self.token_grid, head_hidden_size // head_num_heads) if use_rope else None
        self.time_embedder = FourierTimeEmbedding(hidden_size)
        null_row = class_dropout_prob > 0 and not text_dim
        self.label_embedder = LabelEmbedding(num_classes, hidden_size, null_row) if num_classes + null_row else None

        norm: NormKind = "rms" if use_rmsnorm else "layer"
        feed_forward: FeedForwardKind = "swiglu" if use_swiglu else "gelu"

        kinds = (mlp_ratio, norm, feed_forward, norm if qk_norm else None)
        across = self._reads_across
        self.blocks = nn.ModuleList(
            ModulatedBlock(hidden_size, num_heads, *kinds, cross_attention=across) for _ in range(depth)
        )
        self.condition_proj = nn.Linear(hidden_size, head_hidden_size) if hidden_size != head_hidden_size else None
        # Apart from `blocks`: diffusers' caches may skip the deep part between steps, never the head.
        self.head_blocks = nn.ModuleList(
            HeadBlock(head_hidden_size, head_num_heads, *kinds) for _ in range(head_depth)
        )
        self.norm_out = make_norm(head_hidden_size, norm)
        self.modulation_out = nn.Linear(head_hidden_size, 2 * head_hidden_size)
        self.proj_out = nn.Linear(head_hidden_size, patch_size**2 * in_channels)
        # Without a prompt there is no text token in context: the pooled vector says it.
        self._build_text(num_null_tokens=int(across), pooled=True)
        self.gradient_checkpointing = False

    def initialize_weights(self) -> None:
        """Draw the published initial weights, as the training program does; the model then predicts exactly 0."""
        # Other linear layers keep PyTorch's own initialisation, as in the official code.
        self._initialize_embeddings(self.patch_embed.proj, self.head_patch_embed.proj)
        modulations = (block.modulation for block in (*self.blocks, *self.head_blocks))
        zero_(self.modulation_out, self.proj_out, *modulations)
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
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict from a noisy latent, and from a class or a text.

        The other arguments and the result are those of `LatentTransformerMixin.forward`.

        Args:
            encoder_hidden_states: text embeddings (B, L, text_dim), in a model that takes text.
            encoder_attention_mask: (B, L) bool, True for real tokens; a row of False is an absent prompt. None: all
                tokens are real.

        Raises:
            UserError: (a ValueError) a latent of another size, a time or a class that is none, text that does not
                fit or is missing, padding under an attention backend that takes no mask.
        """
        self._check_latents(hidden_states)
        time = self.time_embedder(self._network_time(timestep, hidden_states.shape[0]))
        text = self._embed_text(encoder_hidden_states, encoder_attention_mask, hidden_states.shape[0])
        condition = self._condition(hidden_states, time, class_labels, text).to(self._matmul_dtype)
        tokens = self.head_patch_embed(hidden_states).float()
        tokens = self._run_blocks(self.head_blocks, tokens, condition, self._rope(self.head_rope, hidden_states))
        sample = self._predict(tokens, condition, hidden_states)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _condition(
        self,
        hidden_states: torch.Tensor,
        time: torch.Tensor,
        class_labels: torch.Tensor | None,
        text: TextTokens | None,
    ) -> torch.Tensor:
        """The deep part: one condition per token, (B, N, head_hidden_size)."""
        conditioning = time
        if self.label_embedder is not None:
            conditioning = conditioning + self.label_embedder(class_labels, like=hidden_states)
        if text is not None and text.pooled is not None:
            conditioning = conditioning + text.pooled
        image = self.patch_embed(hidden_states).float()
        if self.pos_embed is not None:
            image = image + self._positions(hidden_states).float()
        # Every modulation applies SiLU once more: the official network has both.
        conditioning = F.silu(conditioning).to(self._matmul_dtype)
        tokens, reading = self._with_text(image, text)
        rope = self._rope(self.rope, hidden_states, tokens.shape[1] - image.shape[1])
        tokens = self._run_blocks(self.blocks, tokens, conditioning, rope, **reading)
        condition = F.silu(time[:, None] + tokens[:, : image.shape[1]])
        return condition if self.condition_proj is None else self.condition_proj(condition.to(self._matmul_dtype))

    def _positions(self, latents: torch.Tensor) -> torch.Tensor:
        grid = self._grid(latents)
        if grid == self.token_grid:
            return self.pos_embed
        return cached(other_sincos_table)(grid, self.config.hidden_size, self.token_grid, latents.device)

    def _start_from(self, origin: Self, null_class: torch.Tensor) -> None:
        if self.text_embedder is not None:
            self.text_embedder.start_from(null_tokens=None, pooled=null_class)

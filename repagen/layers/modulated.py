"""The transformer block of DiT (Peebles & Xie 2023) with adaptive norms (adaLN-Zero), in its SiT and RAE forms."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from repagen.layers.attention import Attention, QKNorm
from repagen.layers.caching import cacheable_block
from repagen.layers.feed_forward import GELUFeedForward, SwiGLUFeedForward
from repagen.layers.norms import LayerNorm, RMSNorm
from repagen.layers.text_conditioning import TextCrossAttention

NormKind = Literal["layer", "rms"]
"""LayerNorm without affine, or RMSNorm with weight; both with eps 1e-6."""
FeedForwardKind = Literal["gelu", "swiglu"]


def make_norm(dim: int, kind: NormKind) -> nn.Module:
    """Build the norm that a modulation follows."""
    return RMSNorm(dim) if kind == "rms" else LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    """x * (1 + scale) + shift, or x * (1 + scale)."""
    scaled = hidden_states * (1 + scale)
    return scaled if shift is None else scaled + shift


def modulation_parameters(linear: nn.Module, conditioning: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """SiLU, then Linear, cut into `parts`: conditioning (B, D) or (B, L, D) => float32 (B, 1 or L, width) each."""
    if conditioning.ndim == 2:
        conditioning = conditioning[:, None]
    return linear(F.silu(conditioning)).float().chunk(parts, dim=-1)


@cacheable_block
class ModulatedBlock(nn.Module):
    """x += gate * Attention(modulate(norm(x))); x += gate * FeedForward(modulate(norm(x))).

    The residual stream is float32; attention and feed-forward run in the dtype of the conditioning, or of autocast.
    With cross-attention, x += Attention(norm(x), text) stands between the two, without modulation, as in PixArt-alpha
    (arXiv 2310.00426).

    Args:
        dim: width of tokens and of the conditioning.
        heads: number of attention heads.
        mlp_ratio: hidden width of the feed-forward part is int(mlp_ratio * dim), times 2/3 for SwiGLU.
        norm: which norm stands before the modulation.
        feed_forward: which feed-forward part.
        qk_norm: norm of queries and keys.
        bias: whether the queries, keys and values and the feed-forward part have biases (the attention's output
            projection and the modulation have them always).
        use_shift: whether the modulation shifts beside scaling; without (LightningDiT's `wo_shift`) its linear layer
            makes scale and gate for the attention, then for the feed-forward part.
        cross_attention: whether the block attends to text tokens beside the sequence.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        norm: NormKind = "layer",
        feed_forward: FeedForwardKind = "gelu",
        qk_norm: QKNorm | None = None,
        bias: bool = True,
        use_shift: bool = True,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.norm1 = make_norm(dim, norm)
        self.attn = Attention(dim, heads, bias, qk_norm)
        self.cross_attn = (
            TextCrossAttention(make_norm(dim, norm), dim, heads, bias, qk_norm) if cross_attention else None
        )
        self.norm2 = make_norm(dim, norm)
        self.ff: nn.Module = (
            SwiGLUFeedForward(dim, int(2 / 3 * hidden_dim), bias)
            if feed_forward == "swiglu"
            else GELUFeedForward(dim, hidden_dim, bias)
        )
        self.use_shift = use_shift
        self.modulation = nn.Linear(dim, (6 if use_shift else 4) * dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        rotary_cos: torch.Tensor | None = None,
        rotary_sin: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states: (B, L, dim) float32.
            conditioning: (B, dim), or (B, L, dim) with one row per token; its dtype is that of the matrix products.
            rotary_cos: (L, head_dim) or None for no rotary positions.
            rotary_sin: likewise.
            attention_mask: (B, 1, 1, keys) bool, the tokens that are attended to: of the sequence, or in
                cross-attention of the text. None: all.
            encoder_hidden_states: (B, keys, dim) float32, text tokens beside the sequence.

        Returns:
            (B, L, dim) float32.
        """
        dtype = conditioning.dtype
        shift: torch.Tensor | None = None
        ff_shift: torch.Tensor | None = None
        if self.use_shift:
            shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation_parameters(self.modulation, conditioning, 6)
        else:
            scale, gate, ff_scale, ff_gate = modulation_parameters(self.modulation, conditioning, 4)
        own_mask = attention_mask if self.cross_attn is None else None
        attended = self.attn(
            modulate(self.norm1(hidden_states), shift, scale).to(dtype),
            rotary_cos,
            rotary_sin,
            attention_mask=own_mask,
        )
        hidden_states = hidden_states + gate * attended
        if self.cross_attn is not None:
            hidden_states = self.cross_attn(hidden_states, encoder_hidden_states, attention_mask, dtype)
        transformed = self.ff(modulate(self.norm2(hidden_states), ff_shift, ff_scale).to(dtype))
        return hidden_states + ff_gate * transformed


@cacheable_block
class HeadBlock(ModulatedBlock):
    """A `ModulatedBlock` whose conditioning has one row per token: the wide head of DiT^DH."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        rotary_cos: torch.Tensor | None = None,
        rotary_sin: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the block as `ModulatedBlock` does."""
        # A forward of its own gives torch.compile a second code object; one for both kinds would be compiled twice.
        return super().forward(
            hidden_states, conditioning, rotary_cos, rotary_sin, attention_mask, encoder_hidden_states
        )

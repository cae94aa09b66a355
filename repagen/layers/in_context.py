"""The plain transformer block of RAEv2, whose conditions are tokens of the sequence and modulate nothing."""

from __future__ import annotations

import torch
from torch import nn

from repagen.layers.attention import Attention
from repagen.layers.caching import cacheable_block
from repagen.layers.feed_forward import SwiGLUFeedForward
from repagen.layers.norms import RMSNorm
from repagen.layers.text_conditioning import TextCrossAttention


@cacheable_block
class InContextBlock(nn.Module):
    """x += Attention(RMSNorm(x)); x += SwiGLU(RMSNorm(x)), with RMSNorm of queries and keys.

    The residual stream is float32; attention and feed-forward run in `dtype`, or in that of autocast. With
    cross-attention, x += Attention(RMSNorm(x), text) stands between the two.

    Args:
        dim: width of a token.
        heads: number of attention heads.
        mlp_ratio: hidden width of the feed-forward part is int(2/3 * mlp_ratio * dim).
        cross_attention: whether the block attends to text tokens beside the sequence.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, cross_attention: bool = False) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, heads, qk_norm="rms")
        self.cross_attn = TextCrossAttention(RMSNorm(dim), dim, heads, qk_norm="rms") if cross_attention else None
        self.norm2 = RMSNorm(dim)
        self.ff = SwiGLUFeedForward(dim, int(2 / 3 * int(dim * mlp_ratio)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        dtype: torch.dtype,
        rotary_cos: torch.Tensor | None = None,
        rotary_sin: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the block.

        Args:
            hidden_states: (B, L, dim) float32, condition tokens included.
            dtype: that of the matrix products.
            rotary_cos: (L, head_dim), or None for no rotary positions.
            rotary_sin: likewise.
            attention_mask: (B, 1, 1, keys) bool, the tokens that are attended to: of the sequence, or in
                cross-attention of the text. None: all.
            encoder_hidden_states: (B, keys, dim) float32, text tokens beside the sequence.

        Returns:
            (B, L, dim) float32.
        """
        own_mask = attention_mask if self.cross_attn is None else None
        attended = self.attn(self.norm1(hidden_states).to(dtype), rotary_cos, rotary_sin, attention_mask=own_mask)
        hidden_states = hidden_states + attended
        if self.cross_attn is not None:
            hidden_states = self.cross_attn(hidden_states, encoder_hidden_states, attention_mask, dtype)
        return hidden_states + self.ff(self.norm2(hidden_states).to(dtype))

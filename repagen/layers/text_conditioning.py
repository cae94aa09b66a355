"""Text in a generator: embeddings of a prompt to tokens of the generator's width, and attention to them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from repagen.errors import UserError
from repagen.layers.attention import Attention, QKNorm
from repagen.layers.norms import RMSNorm

TextConditioning = Literal["in_context", "cross_attention"]
"""How blocks read text: its tokens join the sequence, or are attended to beside it."""


class TextTokens(NamedTuple):
    """A batch of prompts as a generator reads it.

    Attributes:
        tokens: (B, K, dim) float32.
        mask: (B, K) bool, True for tokens that count; None: all do.
        pooled: (B, dim) float32, one vector a prompt; None where the generator has no use for it.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    pooled: torch.Tensor | None


def trim_padding(embeddings: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Leave out the columns that are padding in every prompt, and the mask where no padding is left.

    Makes attention cheaper, and possible with backends that take no mask. It looks at the mask, which on an
    accelerator waits for it: once a prompt, not in every step.

    Args:
        embeddings: (B, L, D).
        mask: (B, L) bool, True for real tokens.

    Returns:
        Embeddings (B, K, D), and their mask (B, K) or None for no padding. Prompts that are all padding keep their
        mask, with K = 0 where there are no others.
    """
    used = mask.any(0)
    embeddings, mask = embeddings[:, used], mask[:, used]
    return embeddings, None if mask.shape[1] and bool(mask.all()) else mask


class TextEmbedding(nn.Module):
    """RMSNorm and Linear of text embeddings, with a learned stand-in for the absent prompt.

    Token-wise the norm levels the widely different scales of text encoders and of their channels. A row without a
    real token has no prompt: its tokens are `null_tokens`, its pooled vector is `null_pooled`.

    Args:
        text_dim: width of a text embedding.
        dim: width of the generator's tokens.
        has_null: whether there may be rows without a prompt.
        num_null_tokens: tokens that stand for an absent prompt; 0: it has none, and pooled says it.
        pooled: whether to make a pooled vector: Linear(mean of the normalised embeddings of real tokens).
    """

    def __init__(self, text_dim: int, dim: int, *, has_null: bool, num_null_tokens: int, pooled: bool) -> None:
        super().__init__()
        self.text_dim = text_dim
        self.has_null = has_null
        self.norm = RMSNorm(text_dim)
        self.proj = nn.Linear(text_dim, dim)
        self.pooled_proj = nn.Linear(text_dim, dim) if pooled else None
        num_null_tokens = num_null_tokens if has_null else 0
        self.null_tokens = nn.Parameter(torch.randn(num_null_tokens, dim) * dim**-0.5) if num_null_tokens else None
        self.null_pooled = nn.Parameter(torch.randn(dim) * 0.02) if pooled and has_null else None

    def initialize_weights(self) -> None:
        """Draw initial weights: of the tokens as of patches, of the pooled vector as of time and class."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)
        if self.pooled_proj is not None:
            nn.init.normal_(self.pooled_proj.weight, std=0.02)
            nn.init.zeros_(self.pooled_proj.bias)
        if self.null_tokens is not None:
            nn.init.normal_(self.null_tokens, std=self.null_tokens.shape[1] ** -0.5)
        if self.null_pooled is not None:
            nn.init.normal_(self.null_pooled, std=0.02)

    @torch.no_grad()
    def start_from(self, null_tokens: torch.Tensor | None, pooled: torch.Tensor | None) -> None:
        """Let the null tokens (K, dim), and for every prompt and none the pooled vector (dim,), be these."""
        if self.null_tokens is not None and null_tokens is not None:
            self.null_tokens.copy_(null_tokens)
        if self.pooled_proj is not None and pooled is not None:
            nn.init.zeros_(self.pooled_proj.weight)
            self.pooled_proj.bias.copy_(pooled)
        if self.null_pooled is not None and pooled is not None:
            self.null_pooled.copy_(pooled)

    def forward(
        self, embeddings: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype, batch_size: int
    ) -> TextTokens:
        """Embed prompts.

        Args:
            embeddings: (B, L, text_dim).
            mask: (B, L) bool, True for real tokens, in any place; None: all are.
            dtype: of the matrix products.
            batch_size: B, as the latents have it.

        Raises:
            UserError: other shapes, a mask that is not bool, or (seen on the CPU only, because on an accelerator the
                look would cost a synchronisation) a row without a prompt where there is no stand-in.
        """
        self._check(embeddings, mask, batch_size)
        if mask is not None:
            embeddings = embeddings.masked_fill(~mask[..., None], 0)  # whatever stands there, NaN too
        normed = self.norm(embeddings)
        tokens = self.proj(normed.to(dtype)).float()
        pooled = None
        if self.pooled_proj is not None:
            count = normed.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
            pooled = self.pooled_proj((normed.sum(1) / count).to(dtype)).float()  # the norm leaves zeros zero
        if mask is None or not self.has_null:
            return TextTokens(tokens, mask, pooled)
        absent = ~mask.any(1, keepdim=True)
        if self.null_tokens is not None:
            tokens, mask = self._with_null_tokens(tokens, mask, absent)
        if self.null_pooled is not None and pooled is not None:
            pooled = torch.where(absent, self.null_pooled.float(), pooled)
        return TextTokens(tokens, mask, pooled)

    def _with_null_tokens(
        self, tokens: torch.Tensor, mask: torch.Tensor, absent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the null tokens into the rows that are `absent` (B, 1), after making room for them where L is less."""
        assert self.null_tokens is not None
        null = self.null_tokens.float()
        missing = max(len(null) - tokens.shape[1], 0)
        tokens, mask = F.pad(tokens, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        null = F.pad(null, (0, 0, 0, tokens.shape[1] - len(null)))
        counts = torch.arange(tokens.shape[1], device=mask.device) < len(self.null_tokens)
        return torch.where(absent[..., None], null, tokens), torch.where(absent, counts, mask)

    def _check(self, embeddings: torch.Tensor, mask: torch.Tensor | None, batch_size: int) -> None:
        shape = tuple(embeddings.shape)
        if len(shape) != 3 or shape[0] != batch_size or shape[2] != self.text_dim or (mask is None and not shape[1]):
            raise UserError(
                f"encoder_hidden_states: this model takes text embeddings of shape ({batch_size}, tokens, "
                f"{self.text_dim}), one prompt per sample, got {shape}; take the text encoder it was trained with"
            )
        if mask is None:
            return
        if tuple(mask.shape) != shape[:2] or mask.dtype != torch.bool:
            raise UserError(
                f"encoder_attention_mask: expected a bool tensor of shape {shape[:2]}, True for real tokens of "
                f"encoder_hidden_states, got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        looks = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        if looks and not self.has_null and not bool(mask.any(1).all()):
            raise UserError(
                "encoder_attention_mask: a row is all False, and this model has nothing that stands for an absent "
                "prompt (text_dropout_prob is 0); give the text encoder's embeddings of an empty prompt"
            )


class TextCrossAttention(nn.Module):
    """x + Attention(norm(x), text): queries of the sequence, keys and values of text tokens of the same width.

    Args:
        norm: of the sequence, (..., dim) => (..., dim) float32.
        dim: width of a token.
        heads: number of attention heads.
        bias: whether the queries, keys and values have biases.
        qk_norm: norm of queries and keys.
    """

    def __init__(
        self, norm: nn.Module, dim: int, heads: int, bias: bool = True, qk_norm: QKNorm | None = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attn = Attention(dim, heads, bias, qk_norm, is_cross_attention=True)

    def initialize_weights(self) -> None:
        """Let the layer add 0."""
        for parameter in self.attn.to_out[0].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Read the text.

        Args:
            hidden_states: (B, L, dim) float32.
            encoder_hidden_states: (B, K, dim).
            attention_mask: (B, 1, 1, K) bool, the text tokens that count; None: all.
            dtype: of the matrix products.

        Returns:
            (B, L, dim) float32.
        """
        assert encoder_hidden_states is not None
        attended = self.attn(
            self.norm(hidden_states).to(dtype),
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states.to(dtype),
        )
        return hidden_states + attended

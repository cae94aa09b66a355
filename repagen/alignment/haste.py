"""Attention alignment of HASTE (Wang et al. 2025, arXiv 2505.16792): the generator looks where an encoder looks.

HASTE is this term beside REPA's, both with a `cutoff` schedule of weight 0.5 that ends at step 250,000.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from repagen.alignment.plugin import AlignmentBatch, AlignmentTerm, blocks_of, listen, unwrap
from repagen.errors import UserError
from repagen.layers.attention import Attention


def attention_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of attention maps, - sum_k target_qk log softmax(logits)_qk, mean over batch, heads and queries.

    Args:
        logits: (B, heads, N, N) of any dtype.
        target: (B, heads, N, N) of any dtype; rows sum to 1.

    Returns:
        Scalar float32, at least the mean entropy of the target's rows, which it is where both maps are equal.
    """
    return -(target.float() * logits.float().log_softmax(dim=-1)).sum(dim=-1).mean()


class AttentionAlignment(AlignmentTerm):
    """`attention_cross_entropy` of blocks to as many layers of an encoder, in order, mean over the pairs.

    Maps are taken between patches alone on both sides: class, register and condition tokens are left out and the rows
    renormalised, which is the softmax of the patches' own logits. Heads are paired by number, the first `max_heads`.
    Published: DINOv2-B's layers 8 to 11 and SiT's blocks 4 to 7, both counted from 0, first 12 heads. That the
    official code drops the class token before the softmax is from a port of it, not from the code itself.

    Args:
        blocks: of the generator, counted from 1.
        max_heads: heads compared, at most; fewer where generator or encoder have fewer.
    """

    name = "attention"
    needs = frozenset({"attention"})
    listens_to = "input"

    def __init__(self, blocks: Sequence[int] = (5, 6, 7, 8), max_heads: int = 12) -> None:
        super().__init__()
        if not blocks or len(set(blocks)) != len(blocks):
            raise UserError(f"alignment: attention.blocks must be different blocks, at least one, got {list(blocks)}")
        if max_heads < 1:
            raise UserError(f"alignment: attention.max_heads must be at least 1, got {max_heads}")
        self.blocks = tuple(blocks)
        self.max_heads = max_heads

    def tapped(self, network: Any) -> Mapping[int, nn.Module]:
        """See `AlignmentTerm.tapped`."""
        blocks = blocks_of(network, self.blocks, "attention.blocks.{}".format)
        return {number: block.attn for number, block in blocks.items()}

    def attach(self, model: nn.Module) -> None:
        """See `AlignmentTerm.attach`."""
        super().attach(model)
        # torch.compile does not look whether a module inside a block has hooks: blocks compiled one by one would run
        # the code of a block without. So all have one.
        for number, block in enumerate(unwrap(model).blocks, 1):
            listen(block.attn, self._record, number, keeps=False)

    def attention_logits(self, block: int) -> torch.Tensor:
        """Scaled products of queries and keys between the patches of a captured block, (B, heads, N, N) float32.

        Raises:
            UserError: nothing was captured.
        """
        inputs = self.captured(block)
        attention: Attention = self._record.modules[block]
        query, key, _ = attention.project(*inputs)
        query, key = (x[:, : self._record.num_tokens].transpose(1, 2).float() for x in (query, key))
        with torch.autocast(query.device.type, enabled=False):
            return query @ key.transpose(-1, -2) * attention.head_dim**-0.5

    def batch_loss(self, batch: AlignmentBatch, output: Any) -> torch.Tensor:
        """See `AlignmentTerm.batch_loss`: `loss` of the batch's attention maps."""
        return self.loss(batch.need("attention", self.name))

    def loss(self, attention: Sequence[torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of the last captured pass over the pairs of block and layer, a scalar float32.

        Args:
            attention: (B, heads, N, N) between the patches of each layer, rows summing to 1; N as in the generator.

        Raises:
            UserError: nothing was captured, or maps that do not fit in number, batch or size.
        """
        if len(attention) != len(self.blocks):
            raise UserError(f"alignment: {len(self.blocks)} blocks need as many attention maps, got {len(attention)}")
        losses = []
        for block, target in zip(self.blocks, attention, strict=True):
            logits = self.attention_logits(block)
            if target.shape[0] != logits.shape[0] or target.shape[-2:] != logits.shape[-2:]:
                batch, _, tokens, _ = logits.shape
                raise UserError(
                    f"alignment: expected attention maps of shape ({batch}, heads, {tokens}, {tokens}), got "
                    f"{tuple(target.shape)}; let the encoder see images that give it the generator's token grid"
                )
            heads = min(self.max_heads, logits.shape[1], target.shape[1])
            losses.append(attention_cross_entropy(logits[:, :heads], target[:, :heads].detach()))
        return torch.stack(losses).mean()

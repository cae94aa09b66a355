"""The network that DiT, SiT and LightningDiT share: one stack of blocks, all modulated by time and class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from repagen.layers.embeddings import LabelEmbedding, PatchEmbedding, sincos_position_table
from repagen.layers.latent_transformer import LatentTransformerMixin, grid_of, xavier_, zero_
from repagen.layers.modulated import NormKind, make_norm
from repagen.layers.rope import RotaryTable


class SingleStackMixin(LatentTransformerMixin):
    """A `LatentTransformerMixin` whose network is patches + positions => blocks, modulated by time + class.

    The subclass registers its config and calls `_build_stack` in its constructor.
    """

    pos_embed: torch.Tensor
    rope: RotaryTable | None
    register_buffer: Callable[..., None]  # of nn.Module, which stands after this class among the bases
    modules: Callable[[], Iterator[nn.Module]]

    def _build_stack(
        self,
        time_embedder: nn.Module,
        blocks: Iterable[nn.Module],
        *,
        out_channels: int,
        norm: NormKind = "layer",
        use_rope: bool = False,
    ) -> None:
        """Make the modules, of the sizes in `self.config`.

        Args:
            time_embedder: (B,) => (B, hidden_size).
            blocks: the stack.
            out_channels: channels that the final layer makes, a learned variance included.
            norm: kind of the last norm.
            use_rope: rotary positions beside the position table.
        """
        config = self.config
        width = config.hidden_size
        self.token_grid = grid_of(config.sample_size, config.patch_size)
        self.patch_embed = PatchEmbedding(config.in_channels, width, config.patch_size)
        self.register_buffer("pos_embed", sincos_position_table(self.token_grid, width))
        self.time_embedder = time_embedder
        null_row = config.class_dropout_prob > 0
        rows = config.num_classes + null_row
        self.label_embedder = LabelEmbedding(config.num_classes, width, null_row) if rows else None
        self.blocks = nn.ModuleList(blocks)  # refuses a number of heads that does not divide the width
        self.rope = RotaryTable(self.token_grid, width // config.num_heads) if use_rope else None
        self.norm_out = make_norm(width, norm)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, config.patch_size**2 * out_channels)
        self.gradient_checkpointing = False

    def initialize_weights(self) -> None:
        """Draw the published initial weights, as the training program does; the model then predicts exactly 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                xavier_(module)
        self._initialize_embeddings()
        zero_(self.modulation_out, self.proj_out, *(block.modulation for block in self.blocks))

    def _embed(
        self, hidden_states: torch.Tensor, network_time: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the first block: tokens (B, N, D) float32 and the conditioning (B, D)."""
        conditioning = self.time_embedder(network_time)
        if self.label_embedder is not None:
            conditioning = conditioning + self.label_embedder(class_labels, like=hidden_states)
        tokens = self.patch_embed(hidden_states).float() + self.pos_embed.float()
        return tokens, conditioning.to(self._matmul_dtype)

    def _network(
        self,
        hidden_states: torch.Tensor,
        network_time: torch.Tensor,
        class_labels: torch.Tensor | None,
        appended: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LatentTransformerMixin._network`; `appended` tokens (B, M, hidden_size) follow the patches."""
        tokens, conditioning = self._embed(hidden_states, network_time, class_labels)
        if appended is not None:
            tokens = torch.cat([tokens, appended.float()], dim=1)
        return self._run_blocks(self.blocks, tokens, conditioning, self.rope), conditioning

"""What the transformers over latents that can take text share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F

from repagen.errors import UserError
from repagen.layers.latent_transformer import LatentTransformerMixin
from repagen.layers.rope import RotaryTable
from repagen.layers.text_conditioning import TextConditioning, TextCrossAttention, TextEmbedding, TextTokens


class TextTransformerMixin(LatentTransformerMixin):
    """A `LatentTransformerMixin` with a `text_embedder`, None in a model that takes no text.

    The subclass has text_dim, text_conditioning and text_dropout_prob in its config, and says in `_build_text` what
    it does with prompts.
    """

    text_embedder: TextEmbedding | None

    def _classes_or_text(self, num_classes: int | None, text_dim: int) -> int:
        """The number of classes, 1000 or with text 0 where not given; recorded in the config.

        Raises:
            UserError: both classes and text.
        """
        if num_classes and text_dim:
            raise UserError(
                f"num_classes: {num_classes}, but a model that takes text (text_dim={text_dim}) has no classes; "
                "leave one of them out"
            )
        number = num_classes if num_classes is not None else 0 if text_dim else 1000
        self.register_to_config(num_classes=number)  # type: ignore[attr-defined]
        return number

    def _build_text(self, num_null_tokens: int, *, pooled: bool) -> None:
        """Make the text embedder of the sizes in the config; with `num_null_tokens` in place of an absent prompt."""
        config = self.config
        self.any_size = self.takes_text
        self.text_embedder = (
            TextEmbedding(
                config.text_dim,
                config.hidden_size,
                has_null=config.text_dropout_prob > 0,
                num_null_tokens=num_null_tokens,
                pooled=pooled,
            )
            if self.takes_text
            else None
        )

    def _initialize_text(self) -> None:
        """Draw the initial weights of what reads text; cross-attention then adds 0."""
        if self.text_embedder is not None:
            self.text_embedder.initialize_weights()
        for module in self.blocks.modules():
            if isinstance(module, TextCrossAttention):
                module.initialize_weights()

    @property
    def _reads_in_context(self) -> bool:
        return self.takes_text and self.config.text_conditioning == "in_context"

    @property
    def _reads_across(self) -> bool:
        return self.takes_text and self.config.text_conditioning == "cross_attention"

    def _grid(self, latents: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens of latents."""
        return latents.shape[2] // self.config.patch_size, latents.shape[3] // self.config.patch_size

    def _rope(
        self, table: RotaryTable | None, latents: torch.Tensor, num_appended: int = 0
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]] | None:
        """The rotary positions of the tokens of latents, and of `num_appended` tokens without one."""
        return None if table is None else partial(table, self._grid(latents), num_appended)

    def _embed_text(
        self, embeddings: torch.Tensor | None, mask: torch.Tensor | None, batch_size: int
    ) -> TextTokens | None:
        """The prompts of a call, without their mask where it is seen to leave out nothing; None without text.

        Raises:
            UserError: text for a model that takes none, or none for one that does; or as `TextEmbedding.forward`.
        """
        if self.text_embedder is None:
            if embeddings is not None or mask is not None:
                raise UserError(
                    "encoder_hidden_states: this model takes no text (text_dim is 0); leave it out, or take a "
                    "text-to-image model"
                )
            return None
        if embeddings is None:
            raise UserError(
                "encoder_hidden_states: missing; this model takes text, give embeddings of shape "
                f"({batch_size}, tokens, {self.text_embedder.text_dim}), with encoder_attention_mask all False for "
                "no prompt"
            )
        text = self.text_embedder(embeddings, mask, self._matmul_dtype, batch_size)
        looks = text.tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        if text.mask is not None and looks and bool(text.mask.all()):
            text = text._replace(mask=None)
        return text

    def _with_text(
        self, tokens: torch.Tensor, text: TextTokens | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """The sequence (B, L, D) of the deep part, with text in context, and what its blocks take beside it."""
        if text is None:
            return tokens, {}
        mask = text.mask
        if self._reads_across:
            return tokens, {
                "attention_mask": None if mask is None else mask[:, None, None],
                "encoder_hidden_states": text.tokens,
            }
        if mask is not None:
            mask = F.pad(mask, (tokens.shape[1], 0), value=True)[:, None, None]
        return torch.cat([tokens, text.tokens], dim=1), {"attention_mask": mask}

    def to_text_conditional(
        self,
        text_dim: int,
        text_conditioning: TextConditioning = "in_context",
        text_dropout_prob: float = 0.1,
    ) -> Self:
        """A text-conditional model that starts from this class-conditional one's weights.

        It predicts what this model predicts for the null class (for the mean of all classes, where there is no null
        class): with `cross_attention` whatever the prompt, with `in_context` where there is no prompt. A prompt in
        context changes the prediction from the start, since its tokens take their part of the attention.

        Args:
            text_dim: width of the text embeddings.
            text_conditioning: how the blocks read text.
            text_dropout_prob: share of prompts that training will leave out; 0: the model needs one always.

        Raises:
            UserError: this model takes text already.
        """
        if self.takes_text:
            raise UserError(f"text_dim: this {type(self).__name__} takes text already; use it as it is")
        changes: dict[str, Any] = {
            "num_classes": 0,
            "text_dim": text_dim,
            "text_conditioning": text_conditioning,
            "text_dropout_prob": text_dropout_prob,
        }
        new = self.rebuilt(**changes)
        with torch.no_grad():
            new._start_from(self, self._null_class())
        return new

    def _null_class(self) -> torch.Tensor:
        """The embedding (hidden_size,) of no class, or the nearest thing to it."""
        if self.label_embedder is None:
            return self.patch_embed.proj.weight.new_zeros(self.config.hidden_size)
        table = self.label_embedder.table.weight
        has_null = len(table) > self.label_embedder.num_classes
        return table[-1] if has_null else table.mean(0)

    def _start_from(self, origin: Self, null_class: torch.Tensor) -> None:
        """Let what is new predict as the class-conditional `origin` does for the class embedding given."""
        raise NotImplementedError

"""What a call says of its prompts: texts or their embeddings, in all combinations, checked and brought to one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from repagen.errors import UserError

Prompts: TypeAlias = str | Sequence[str]

NULL_PROMPTS = ("learned", "empty")
"""What the null pass of classifier-free guidance is asked for where a call says nothing of it: the generator's own
learned token, or the text encoder's embedding of the empty text. As the generator was trained."""


@dataclass(frozen=True)
class PromptArgument:
    """The prompts of one argument of a call: texts, or embeddings, or nothing.

    Attributes:
        name: of the argument.
        texts: one text, or a list.
        embeddings: (B, L, D).
        mask: (B, L) bool, True for real tokens; None: all are.
    """

    name: str
    texts: Prompts | None
    embeddings: torch.Tensor | None
    mask: torch.Tensor | None

    @property
    def is_given(self) -> bool:
        """Whether it says anything."""
        return self.texts is not None or self.embeddings is not None

    def check(self, text_encoder: Any, text_dim: int | None) -> None:
        """Refuse what is no prompt, or what the pipeline cannot read.

        Args:
            text_encoder: of the pipeline; None: it has none.
            text_dim: D that the transformer takes; None: not known.

        Raises:
            UserError: names the argument and what is allowed.
        """
        name = self.name
        if self.texts is not None and self.embeddings is not None:
            raise UserError(f"{name} and {name}_embeds are both given; leave one of them out")
        if self.mask is not None and self.embeddings is None:
            raise UserError(f"{name}_embeds_mask is given without {name}_embeds; give both")
        if self.texts is not None:
            self._check_texts(self.texts, text_encoder)
        if self.embeddings is not None:
            self._check_embeddings(self.embeddings, text_dim)

    def _check_texts(self, texts: Any, text_encoder: Any) -> None:
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, (list, tuple)) or not all(isinstance(text, str) for text in listed):
            raise UserError(
                f"{self.name} is {str(texts)[:80]!r} of type {type(texts).__name__}; give a text, or a list"
            )
        if not listed:
            raise UserError(f"{self.name} is an empty list; give at least one text")
        if text_encoder is None:
            raise UserError(
                f"{self.name} is given, but the pipeline has no text_encoder; give {self.name}_embeds, or load the "
                "pipeline with one"
            )

    def _check_embeddings(self, embeddings: torch.Tensor, text_dim: int | None) -> None:
        name = f"{self.name}_embeds"
        for argument, value in {name: embeddings, f"{name}_mask": self.mask}.items():
            if not isinstance(value, torch.Tensor | None):
                raise UserError(f"{argument} is a {type(value).__name__}; give a tensor")
        shape = tuple(embeddings.shape)
        if len(shape) != 3 or 0 in shape or not embeddings.is_floating_point():
            raise UserError(f"{name} is {embeddings.dtype} of shape {shape}; give floats (prompts, tokens, width)")
        if text_dim is not None and shape[2] != text_dim:
            raise UserError(f"{name} has width {shape[2]}; this pipeline's transformer takes {text_dim}")
        if self.mask is not None and (self.mask.dtype != torch.bool or tuple(self.mask.shape) != shape[:2]):
            raise UserError(
                f"{name}_mask is {self.mask.dtype} of shape {tuple(self.mask.shape)}; give bool {shape[:2]}, True "
                "for real tokens"
            )

    def embed(self, text_encoder: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (B, L, D) and mask (B, L) of what is given."""
        if self.texts is not None:
            texts = [self.texts] if isinstance(self.texts, str) else list(self.texts)
            embeddings, mask = text_encoder.encode(texts, device=device)
            return embeddings.to(device), mask.to(device)
        assert self.embeddings is not None
        mask = (
            self.embeddings.new_ones(self.embeddings.shape[:2], dtype=torch.bool) if self.mask is None else self.mask
        )
        return self.embeddings.to(device), mask.to(device)


def as_many(embeddings: torch.Tensor, mask: torch.Tensor, count: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat one prompt for all of `count`; leave as many as there are.

    Raises:
        UserError: another number.
    """
    if len(embeddings) not in (1, count):
        raise UserError(f"{name} has {len(embeddings)} prompts for {count} of prompt; give one, or one for each")
    return embeddings.expand(count, -1, -1), mask.expand(count, -1)


def of_one_length(*prompts: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Fill up embeddings (B, L, D) with zeros, and their masks with False, to the longest L."""
    longest = max(mask.shape[1] for _, mask in prompts)
    return [
        (F.pad(embeddings, (0, 0, 0, longest - mask.shape[1])), F.pad(mask, (0, longest - mask.shape[1])))
        for embeddings, mask in prompts
    ]

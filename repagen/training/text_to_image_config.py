"""The configuration of text-to-image training, `repagen.training.text_to_image`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from repagen.config import require
from repagen.errors import UserError
from repagen.training.generator_config import NewGeneratorConfig, require_dropout

NullPrompt = Literal["learned", "empty"]
"""`NULL_PROMPTS` of the pipeline."""


@dataclass
class TextConfig:
    """The frozen text encoder, and what a dropped prompt becomes.

    Attributes:
        encoder: folder or Hub id of a text encoder of transformers, or several, whose embeddings follow each other;
            `shapes` for the bundled one; None: that of the pipeline `transformer.pretrained`.
        hidden_layer: -1: the last layer after the final norm; else the index of a block whose output is taken. A list
            has one for each encoder.
        max_length: tokens of a prompt; None: those of the family, or as many as the pipeline `transformer.pretrained`
            reads. A list has one for each encoder.
        template: words around each prompt, with `{prompt}` in its place.
        revision: branch, tag or commit on the Hub.
        null_prompt: what takes the place of a dropped prompt, and guides in sampling: `learned`, a token that the
            generator learns, or `empty`, the embeddings of the empty text.
        dropout: share of prompts dropped, which classifier-free guidance needs.
        cache: folder in which embeddings are kept, so that each prompt is encoded once; None: encode at every step.
    """

    encoder: str | list[str] | None = None
    hidden_layer: int | list[int] = -1
    max_length: int | list[int] | None = None
    template: str | None = None
    revision: str | None = None
    null_prompt: NullPrompt = "learned"
    dropout: float = 0.1
    cache: str | None = None

    def validate(self) -> None:
        """Check the ranges."""
        require_dropout(self.dropout, "dropout")
        lengths = self.max_length if isinstance(self.max_length, list) else [self.max_length]
        require(all(length is None or length >= 1 for length in lengths), "max_length", self.max_length, "at least 1")
        template = self.template
        require(template is None or "{prompt}" in template, "template", template, "a text with {prompt} in it")
        if self.encoder is None:
            for name in ("hidden_layer", "max_length", "template", "revision"):
                value = getattr(self, name)
                default = getattr(TextConfig, name)
                require(value == default, name, value, "left out without text.encoder")
            return
        require(bool(self.encoder), "encoder", self.encoder, "at least one text encoder")
        for name in ("hidden_layer", "max_length"):
            value = getattr(self, name)
            fits = not isinstance(value, list) or (isinstance(self.encoder, list) and len(value) == len(self.encoder))
            require(fits, name, value, "one value, or a list with one for each encoder")


@dataclass(kw_only=True)
class TextToImageConfig(NewGeneratorConfig):
    """Everything about one training of a text-to-image generator.

    A second stage on other data is the same program with `transformer.pretrained`, the released pipeline of the first.

    Attributes:
        text: the text encoder.
    """

    text: TextConfig = field(default_factory=TextConfig)

    def validate(self) -> None:
        """Check that there is a text encoder."""
        super().validate()
        if self.text.encoder is None and self.transformer.pretrained is None:
            raise UserError(
                "text.encoder: nothing given; allowed: a folder or Hub id of a text encoder, or none beside "
                "transformer.pretrained, a text-to-image pipeline that has one"
            )
        if self.alignment.class_token is not None:
            raise UserError("alignment.class_token: no network takes both text and a class token; leave it out")

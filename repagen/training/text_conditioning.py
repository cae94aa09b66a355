"""Text as the condition of a generator in training: a frozen text encoder, its cache, and the null prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from repagen.data import SampleDataset
from repagen.encoders.prompt_cache import CachedTextEncoder
from repagen.encoders.text import TextEncoder
from repagen.encoders.text_storage import unlike
from repagen.errors import UserError, naming
from repagen.flow.conditions import ConditionDropout, Conditions
from repagen.hub.places import without_names
from repagen.models.opening import open_component, pipeline_parts
from repagen.pipelines.text_to_image import TextToImagePipeline
from repagen.training.frozen import encoder_source
from repagen.training.run import Batch, Run
from repagen.training.text_to_image_config import NullPrompt, TextToImageConfig


class TextConditioning:
    """Captions, as embeddings of a frozen text encoder; see `Conditioning`.

    Args:
        text_encoder: put to work on the run's device, in float32 whatever the run's precision.
        run: gives device and precision.
        null: what a dropped prompt becomes.
        dropout: share of prompts dropped.
        shown: prompts of the sample grids.
        cache: folder in which embeddings are kept; None: none are.

    Raises:
        UserError: the cache is of another text encoder.
    """

    def __init__(
        self,
        text_encoder: Any,
        run: Run,
        null: NullPrompt,
        dropout: float,
        shown: Sequence[str],
        cache: str | None = None,
    ) -> None:
        self.text_encoder = text_encoder.requires_grad_(False).to(run.device)
        with naming({"": "text.cache: "}):
            self._reader = self.text_encoder if cache is None else CachedTextEncoder(cache, self.text_encoder)
        self._device = run.device
        self._null = null
        self.shown = list(shown)
        self.dropout = ConditionDropout(dropout, self._null_condition())

    @property
    def model_arguments(self) -> Mapping[str, Any]:
        """See `Conditioning`."""
        text = {"text_dim": self.text_encoder.embed_dim, "text_dropout_prob": self.dropout.probability}
        return {"num_classes": 0, "class_dropout_prob": 0.0, **text}

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        """See `Conditioning`."""
        return {"text encoder": without_names(self.text_encoder.describe())}

    def conditions(self, batch: Batch) -> Conditions:
        """See `Conditioning`."""
        embeddings, mask = self._reader.encode(batch["caption"], device=self._device)
        return Conditions(text=embeddings, text_mask=mask)

    def guides(self, model: Any) -> bool:
        """See `Conditioning`."""
        return bool(model.config.text_dropout_prob)

    def pipeline(self, **parts: Any) -> Any:
        """See `Conditioning`."""
        return TextToImagePipeline(text_encoder=self.text_encoder, null_prompt=self._null, **parts)

    def _null_condition(self) -> Conditions:
        """The conditions, of one row, of a dropped prompt."""
        if self._null == "learned":
            nothing = torch.zeros(1, self._reader.max_length, self._reader.embed_dim, device=self._device)
            return Conditions(text=nothing, text_mask=nothing.new_zeros(nothing.shape[:2], dtype=torch.bool))
        embeddings, mask = self._reader.encode([""], device=self._device)
        return Conditions(text=embeddings, text_mask=mask)


def open_text_encoder(config: TextToImageConfig) -> TextEncoder:
    """Load the text encoder that a configuration names, or that of the pipeline it goes on from.

    The same encoder may lie elsewhere; tokens that are not asked for (`max_length`) are as many as the pipeline reads.

    Raises:
        UserError: nothing that can be loaded is there, or a pretrained pipeline has another one.
    """
    text, transformer = config.text, config.transformer
    name, key, own = transformer.pretrained, "transformer.pretrained", None
    if name is not None and "text_encoder" in pipeline_parts(name, key, transformer.revision):
        own = open_component(name, "text_encoder", key, transformer.revision)
    if text.encoder is None:
        if own is None:
            raise UserError(f"text.encoder: nothing given, and {name} has no text encoder; name one")
        return own
    sources = [encoder_source(one) for one in ([text.encoder] if isinstance(text.encoder, str) else text.encoder)]
    read = [] if own is None else [one["max_length"] for one in own.describe()]
    with naming({"": "text.encoder: "}):
        encoder = TextEncoder.from_encoder(
            sources,
            hidden_layer=text.hidden_layer,
            max_length=read if text.max_length is None and len(read) == len(sources) else text.max_length,
            template=text.template,
            revision=text.revision,
        )
    if own is not None and (reason := unlike(own.describe(), encoder.describe())):
        raise UserError(
            f"text.encoder: {text.encoder} is not the text encoder of {name}, or is read in another way ({reason}); "
            "leave text.encoder and how it is read out to take that one, or set transformer.pretrained="
            f"{name}/transformer to train with another"
        )
    return encoder


def shown_prompts(given: Sequence[str], dataset: SampleDataset, count: int) -> list[str]:
    """Prompts of the sample grids: those that are given, or the first captions of the data."""
    return list(given) or [dataset.captions(index).draw() for index in range(min(count, len(dataset)))]

"""What defines an encoder but its weights; imports no network, so that what only decodes can name one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from repagen.errors import UserError

Layers = Literal["last"] | int | Sequence[int]
Combination = Literal["last", "mean", "sum", "mean_plus_spatial_mean"]


@dataclass(frozen=True)
class EncoderSpec:
    """All that defines an encoder but its weights; JSON-able by `dataclasses.asdict`.

    Attributes:
        family: a name of `repagen.encoders.FAMILIES`.
        config: the network's own description: keys of the transformers config, or of a timm `config.json`.
        image_size: side in pixels of the image the network sees.
        layers: "last", a block index, or a list of block indices (0-based, negative from the end).
        combination: how several layers become one: the last, their mean, their sum, or their mean plus the mean over
            all patches of the last one (RAEv2, arXiv 2605.18324).
        norm_affine: keep weight and bias of the final norm (REPA's targets) or only its normalisation (RAE's latents).
        image_mean, image_std: pixel normalisation, per channel; None takes the family's.
        name_or_path: Hub id or folder the weights come from; None for random weights.
        revision: commit of the Hub repository.
    """

    family: str
    config: dict[str, Any]
    image_size: int | None = None
    layers: Layers = "last"
    combination: Combination = "last"
    norm_affine: bool = True
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None
    name_or_path: str | None = None
    revision: str | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "encoder") -> EncoderSpec:
        """Read a spec from a config; unknown and missing keys are refused by name."""
        return _from_mapping(cls, values, where)


@dataclass(frozen=True)
class TextEncoderSpec:
    """All that defines a text encoder but its weights and its tokenizer; JSON-able by `dataclasses.asdict`.

    Attributes:
        family: a name of `repagen.encoders.text_families.TEXT_FAMILIES`.
        config: the network's own description: keys of its transformers config.
        max_length: tokens that are read of a prompt, and given out for it.
        hidden_layer: the index of a block (0-based, negative from the end): -1, the last, is read after the final
            norm, any other as the block gives it, before any final norm.
        template: text around each prompt, with `{prompt}` in its place; None: the prompt alone.
        name_or_path: Hub id or folder the weights come from; None for random weights.
        revision: commit of the Hub repository.
        weights: hash of the weights, once known.
        tokenizer: hash of the tokenizer, once known.
    """

    family: str
    config: dict[str, Any]
    max_length: int
    hidden_layer: int = -1
    template: str | None = None
    name_or_path: str | None = None
    revision: str | None = None
    weights: str | None = None
    tokenizer: str | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "text encoder") -> TextEncoderSpec:
        """Read a spec from a config; unknown and missing keys are refused by name."""
        return _from_mapping(cls, values, where)


def _from_mapping(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    items = dataclasses.fields(kind)
    known = {item.name for item in items}
    if unknown := sorted(set(values) - known):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
    for item in items:
        if item.name not in values and item.default is dataclasses.MISSING:
            raise UserError(f"{where}: the key {item.name!r} is missing")
    return kind(**values)

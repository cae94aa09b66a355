"""Frozen text encoders behind one contract: prompts in, token embeddings and a mask out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from repagen.encoders.families import licence_fact
from repagen.encoders.spec import TextEncoderSpec
from repagen.encoders.text_storage import StoredTextEncoder
from repagen.encoders.text_tower import TextTower, load_tower, prompt_list, text_family, tower_config
from repagen.errors import UserError
from repagen.hub.published import PublishedModelMixin

if TYPE_CHECKING:
    from repagen.hub.card import LicenceFact

Source = str | os.PathLike[str]


class TextEmbeddings(NamedTuple):
    """What a text encoder reads in prompts.

    Attributes:
        embeddings: (B, L, D) float32, zero where the mask is False.
        mask: (B, L) bool, True at a prompt's own tokens; each row has at least one.
    """

    embeddings: torch.Tensor
    mask: torch.Tensor


class TextEncoder(PublishedModelMixin, StoredTextEncoder, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One or several frozen text encoders of transformers, with their tokenizers, as a component of a pipeline.

    Every prompt becomes `max_length` embeddings of width `embed_dim`, so that its row depends on no other prompt.
    Several encoders follow each other along the tokens, the narrower ones filled up with zeros (as Stable Diffusion 3
    joins CLIP and T5, arXiv 2403.03206). Nothing has gradients and `train()` leaves it in eval mode.

    Args:
        encoders: fields of `TextEncoderSpec` of each encoder.
        encoders_stored: whether the weights lie in the same folder; else they are fetched from where the specs say on
            the first `encode`.

    Attributes:
        embed_dim: D, the width of the widest encoder.
        max_length: L, the sum of the encoders' own.

    Raises:
        UserError: no encoder, or a spec with a wrong key or value.
    """

    @register_to_config
    def __init__(self, encoders: list[dict[str, Any]], encoders_stored: bool = True) -> None:
        super().__init__()
        if not encoders:
            raise UserError("text encoder: none given; name at least one")
        if not isinstance(encoders, Sequence) or not all(isinstance(encoder, Mapping) for encoder in encoders):
            raise UserError(f"text encoder: encoders must be a list of descriptions, got {str(encoders)[:100]!r}")
        specs = [TextEncoderSpec.from_mapping(dict(encoder)) for encoder in encoders]
        # Where the weights are, or will be when they come.
        self.register_buffer("placement", torch.empty(0), persistent=False)
        self.towers = nn.ModuleList([TextTower(spec) for spec in specs] if encoders_stored else [])
        self._specs = specs
        self._widths = [tower_config(spec).hidden_size for spec in specs]
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_encoder(
        cls,
        name_or_path: Source | Sequence[Source],
        *,
        hidden_layer: int | Sequence[int] = -1,
        max_length: int | Sequence[int | None] | None = None,
        template: str | Sequence[str | None] | None = None,
        revision: str | Sequence[str | None] | None = None,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> TextEncoder:
        """Load official text encoders from folders of transformers' layout or the Hub.

        Args:
            name_or_path: a folder or Hub id, or several. The other arguments then hold for all of them, or are
                sequences with a value for each.
            hidden_layer: the index of a block (0-based, negative from the end). -1, the last, is read after the final
                norm, any other before any final norm: -2 is `hidden_states[-2]` of transformers.
            max_length: tokens of a prompt; by default those of the family (CLIP 77, SigLIP 64, others 256). Longer
                prompts lose their end, which is logged once.
            template: text around each prompt, with `{prompt}` in its place, such as the words of a chat template; none
                by default.
            revision: branch, tag or commit on the Hub; resolved to a commit before anything is loaded.
            dtype: of the weights; embeddings are float32 whatever it is.
            local_files_only: never touch the network.

        Raises:
            UserError: one line for what cannot be found, reached or read, and for arguments that do not fit.
        """
        sources: list[Any] = list(name_or_path) if isinstance(name_or_path, list | tuple) else [name_or_path]
        for source in sources:
            if not isinstance(source, str | os.PathLike):
                raise UserError(f"text encoder: {source!r} given; give a folder or a Hub id, or a list of them")
        asked = {"hidden_layer": hidden_layer, "max_length": max_length, "template": template, "revision": revision}
        options = [dict(zip(asked, values, strict=True)) for values in zip(*_each(asked, len(sources)), strict=True)]
        towers = [
            load_tower(source, dtype=dtype, local_files_only=local_files_only, **option)
            for source, option in zip(sources, options, strict=True)
        ]
        encoder = cls([dataclasses.asdict(tower.spec) for tower in towers], encoders_stored=False)
        encoder.placement = encoder.placement.to(dtype)
        encoder.towers = nn.ModuleList(towers)
        return encoder

    @property
    def embed_dim(self) -> int:
        """Width D of an embedding."""
        return max(self._widths)

    @property
    def max_length(self) -> int:
        """Number L of embeddings of a prompt."""
        return sum(spec.max_length for spec in self._specs)

    def encode(self, prompts: Sequence[str], *, device: torch.device | None = None) -> TextEmbeddings:
        """Read prompts; those that are saved by reference are fetched now, the first time.

        Args:
            prompts: any texts, also empty, in any language and of any length; one text alone counts as a list of one.
            device: where to compute; by default where the weights are. A pipeline that offloads them passes its own.

        Returns:
            Embeddings (B, L, D) float32 and their mask (B, L), on that device.

        Raises:
            UserError: for anything but texts, and an encoder that cannot be loaded.
        """
        call: Any = self  # not `forward`, for the hooks that offload
        return call(prompts, device=device)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str], *, device: torch.device | None = None) -> TextEmbeddings:
        """See `encode`."""
        prompts = prompt_list(prompts)
        self.load()
        device = self.device if device is None else torch.device(device)
        width, parts = self.embed_dim, []
        for tower in self._loaded():
            states, mask = tower(*(value.to(device) for value in tower.tokenize(prompts)))
            parts.append((nn.functional.pad(states, (0, width - tower.width)), mask))
        embeddings, masks = zip(*parts, strict=True)
        return TextEmbeddings(torch.cat(embeddings, dim=1), torch.cat(masks, dim=1))

    def part_licences(self) -> tuple[LicenceFact, ...]:
        """See `PublishedMixin.part_licences`: the encoders'."""
        stored = bool(self.config.encoders_stored)
        return tuple(
            licence_fact(text_family(spec), spec.name_or_path, spec.revision, stored, part="text encoder")
            for spec in self._specs
        )

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in eval mode, whatever `mode` says."""
        super().train(False)
        return self


def _each(values: Mapping[str, Any], count: int) -> list[list[Any]]:
    """A list of `count` values of each argument.

    Raises:
        UserError: a sequence of another length.
    """
    lists = []
    for name, value in values.items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if several and len(value) != count:
            raise UserError(f"text encoder: {name} has {len(value)} values for {count} encoders; give one or {count}")
        lists.append(list(value) if several else [value] * count)
    return lists

"""The frozen parts of a generator's training: its autoencoder, and the encoders that hidden states are aligned to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repagen.alignment import AlignmentTerm
from repagen.data import LatentShards, SampleDataset, digits_encoder_path, shapes_encoders_path
from repagen.encoders import VisionEncoder, VisionEncoderOutput
from repagen.encoders.vision import layer_indices
from repagen.errors import UserError, naming
from repagen.hub.places import without_names
from repagen.models.identity import describe_autoencoder, describe_encoder
from repagen.models.latents import images_to_latents, latent_shape, require_independent_latents
from repagen.randomness import normal_per_sample
from repagen.training.generator_config import (
    AlignmentTargetConfig,
    AttentionAlignmentConfig,
    ClassTokenConfig,
    GeneratorRunConfig,
    NewGeneratorConfig,
)
from repagen.training.generator_model import token_grid
from repagen.training.latent_cache import require_matching_cache
from repagen.training.latent_identity import open_autoencoder
from repagen.training.run import Batch, Run

EncoderSection = AlignmentTargetConfig | AttentionAlignmentConfig | ClassTokenConfig
_Place = tuple[str, str | None, int | None]

BUNDLED_ENCODERS: dict[str, Callable[[], Path]] = {"digits": digits_encoder_path, "shapes": shapes_encoders_path}
"""Encoders that ship with the package, by the name a configuration gives them."""


class FrozenParts:
    """Turns batches of images, or of cached latents, into what the objective takes.

    Attributes:
        autoencoder: decodes the latents; encodes them too unless they are cached.
        latent_shape: (C, h, w).
        target_dims: token width of each alignment encoder.
        class_token_dim: width of the class token that the generator denoises; 0: none.
        fingerprints: what identifies the frozen models.
    """

    def __init__(
        self,
        config: GeneratorRunConfig,
        autoencoder: Any,
        grid_of: Callable[[tuple[int, int, int]], tuple[int, int]],
        dataset: SampleDataset,
        run: Run,
    ) -> None:
        """Put the autoencoder to work and load the encoders.

        Args:
            config: names the encoders.
            autoencoder: of the latents.
            grid_of: shape (C, h, w) of a latent => rows and columns of the generator's tokens.
            dataset: images, or latents that must be this autoencoder's.
            run: gives device and precision.

        Raises:
            UserError: something is not there or does not fit.
        """
        self._run = run
        self._config = config.alignment
        self._image_size = config.data.image_size
        self._encoders: dict[_Place, VisionEncoder] = {}
        self.autoencoder = autoencoder.requires_grad_(False).to(run.device)
        with naming({"image_size": "data.image_size"}):
            self.latent_shape = latent_shape(self.autoencoder, config.data.image_size)
        self.fingerprints: dict[str, Any] = {"autoencoder": without_names(describe_autoencoder(self.autoencoder))}
        self.target_dims: list[int] = []
        self.class_token_dim = 0
        self._load_encoders(dataset, grid_of(self.latent_shape))

    @classmethod
    def open(cls, config: NewGeneratorConfig, dataset: SampleDataset, run: Run) -> FrozenParts:
        """Load the autoencoder and the encoders that a training names.

        Raises:
            UserError: something is not there or does not fit.
        """
        place = config.autoencoder
        autoencoder = open_autoencoder(
            place.path, option="autoencoder.path", subfolder=place.subfolder, revision=place.revision
        )
        require_independent_latents(autoencoder, "autoencoder.path")
        return cls(config, autoencoder, partial(token_grid, config.transformer), dataset, run)

    @property
    def networks(self) -> list[nn.Module]:
        """The autoencoder and the encoders."""
        return [self.autoencoder, *self._encoders.values()]

    def _load_encoders(self, dataset: SampleDataset, grid: tuple[int, int]) -> None:
        """Load the alignment encoders, each place once, or find their tokens among the cached latents."""
        config = self._config
        further = {"attention": config.attention, "class_token": config.class_token}
        if isinstance(dataset, LatentShards):
            require_matching_cache(dataset, self.autoencoder)
            self.target_dims = _cached_target_dims(dataset, config.targets)
            for name, section in further.items():
                if section is not None:
                    raise UserError(f"alignment.{name}: needs images, and data.kind=latents has none; train from them")
            return
        sections: dict[str, EncoderSection] = {f"targets.{k}": target for k, target in enumerate(config.targets)}
        self.target_dims = [self._load(target, grid, name).hidden_size for name, target in sections.items()]
        self.fingerprints["alignment encoders"] = [self._describe(target) for target in config.targets]
        for name, section in further.items():
            if section is not None:
                self._load(section, grid, name)
                self.fingerprints[f"{name} encoder"] = self._describe(section)
                sections[name] = section
        for option, seeing in sections.items():
            for size in dataset.bucket_sizes:
                name = f"data.buckets (alignment.{option}.encoder)"
                self._encoders[_place(seeing)].grid_of(size, self._image_size, name)
        if config.attention is not None:
            count = self._encoders[_place(config.attention)].backbone.num_layers
            with naming({"encoder.": "alignment.attention."}):
                layer_indices(config.attention.layers, count)
        if config.class_token is not None:
            self.class_token_dim = self._encoders[_place(config.class_token)].hidden_size

    def _load(self, section: EncoderSection, grid: tuple[int, int], name: str) -> VisionEncoder:
        place = _place(section)
        if place not in self._encoders:
            self._encoders[place] = load_target_encoder(section, grid, f"alignment.{name}.encoder").to(
                self._run.device
            )
        return self._encoders[place]

    def _describe(self, section: EncoderSection) -> dict[str, Any]:
        return without_names(describe_encoder(self._encoders[_place(section)]))

    @torch.no_grad()
    def latents(self, batch: Batch) -> torch.Tensor:
        """Standardised latents (B, C, h, w) float32; a KL autoencoder's are drawn from its posterior anew."""
        if "latent" not in batch:
            with self._run.autocast():
                generators = self._run.generators("posterior", batch)
                return images_to_latents(self.autoencoder, batch["image"], generator=generators).float()
        latents = batch["latent"]
        if "latent_std" in batch:
            noise = normal_per_sample(self._run.generators("posterior", batch), latents.shape[1:])
            latents = latents + batch["latent_std"] * noise
        return latents

    @torch.no_grad()
    def alignment_inputs(
        self, batch: Batch, terms: Mapping[str, AlignmentTerm], active: Collection[str]
    ) -> dict[str, Any]:
        """What terms need beside the noisy latents, as fields of `AlignmentBatch`, from the same (augmented) images.

        Args:
            batch: of the data.
            terms: all of them; a class token is given to the generator whatever its weight.
            active: names of those whose loss is computed.
        """
        needs = {need for name in active for need in terms[name].needs}
        given: dict[str, Any] = {"generators": lambda purpose: self._run.generators(purpose, batch)}
        if "targets" in batch:
            return {**given, "targets": batch["targets"]} if "targets" in needs else given
        config = self._config
        layers = config.attention.layers if config.attention is not None and "attention" in needs else []
        seen: dict[_Place, VisionEncoderOutput] = {}

        def see(section: EncoderSection) -> VisionEncoderOutput:
            place = _place(section)
            if place not in seen:
                wanted = layers if config.attention is not None and place == _place(config.attention) else []
                encoder, images = self._encoders[place], batch["image"]
                grid = encoder.grid_of(images.shape[-2:], self._image_size)
                seen[place] = encoder(images, attention_layers=wanted, grid=grid)
            return seen[place]

        with self._run.autocast():
            if "targets" in needs:
                given["targets"] = [see(target).tokens for target in config.targets]
            if config.attention is not None and layers:
                given["attention"] = see(config.attention).attention
            if config.class_token is not None:
                given["class_token"] = see(config.class_token).cls
        return given


def encoder_source(name: str) -> str:
    """Where the encoder that a configuration names is: a bundled one's folder, or the name itself."""
    return str(BUNDLED_ENCODERS[name]()) if name in BUNDLED_ENCODERS else name


def load_target_encoder(target: EncoderSection, grid: tuple[int, int], option: str) -> VisionEncoder:
    """Load an alignment encoder, its final norm with affine (REPA), seeing images that give it the generator's grid.

    Args:
        target: the encoder.
        grid: rows and columns of the generator's tokens.
        option: what the user gave the encoder as, for messages.

    Raises:
        UserError: if it cannot be loaded, or not at that size.
    """
    source = encoder_source(target.encoder)
    if target.image_size is None and grid[0] != grid[1]:
        raise UserError(f"{option}: the generator's grid {grid[0]}x{grid[1]} is not square; set image_size beside it")
    grid_size = grid[0] if target.image_size is None else None
    with naming({"encoder ": f"{option} "}):
        return VisionEncoder.from_pretrained(
            source, revision=target.revision, image_size=target.image_size, grid_size=grid_size
        )


def _place(section: EncoderSection) -> _Place:
    """Sections of equal places share one encoder."""
    return section.encoder, section.revision, section.image_size


def _same_encoder(cached: Mapping[str, Any], name: str) -> bool:
    """Whether a cache's encoder is the one a configuration names; a bundled one lies elsewhere on every machine."""
    if name in BUNDLED_ENCODERS:
        return cached["weights"] == VisionEncoder.from_pretrained(encoder_source(name)).fingerprint()
    return cached["name"] in (name, name.replace("timm:", "timm/", 1))  # a cache names the Hub's repository


def _cached_target_dims(shards: LatentShards, targets: Sequence[AlignmentTargetConfig]) -> list[int]:
    """Token width of each cached alignment encoder; the cache must hold those that the configuration names."""
    if not targets:
        return []
    cached = [encoder["name"] for encoder in shards.manifest["encoders"]]
    named = [target.encoder for target in targets]
    found = [_same_encoder(*pair) for pair in zip(shards.manifest["encoders"], named, strict=False)]
    if len(cached) != len(named) or not all(found):
        raise UserError(
            f"alignment.targets: the cached latents hold the tokens of {cached or 'no encoder'}, the configuration "
            f"names {named}; run `repagen cache` again with those encoders, or change alignment.targets"
        )
    return [tokens.shape[-1] for tokens in shards.load(0)["targets"]]

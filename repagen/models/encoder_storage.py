"""How an autoencoder keeps its frozen encoder: inside its folder, or by Hub id and commit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from repagen.encoders.spec import EncoderSpec
from repagen.errors import UserError
from repagen.hub.fetching import complete_snapshot

if TYPE_CHECKING:
    from repagen.encoders import VisionEncoder
    from repagen.hub.card import LicenceFact

logger = logging.getLogger(__name__)

SUBFOLDER = "encoder.frozen"  # diffusers splits the names in a component's folder at their dots


def load_encoder(config: Any, folder: Path | None) -> VisionEncoder:
    """Load the encoder an autoencoder's config describes.

    Args:
        config: the autoencoder's config.
        folder: the folder it was loaded from, if any.

    Raises:
        UserError: if its files are missing, closed, out of reach, or named by a branch.
    """
    from repagen.encoders import VisionEncoder
    from repagen.encoders.files import require_pinned

    spec = EncoderSpec.from_mapping(config.encoder)
    if config.encoder_stored and folder is not None:
        return VisionEncoder.from_spec(spec, _stored_folder(folder))
    if spec.name_or_path is None:
        # A function of the description alone, so that copies by state dict agree in their encoder too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return VisionEncoder.from_config(spec)
    require_pinned(spec.name_or_path, spec.revision, "encoder")
    found = VisionEncoder.from_pretrained(spec.name_or_path, revision=spec.revision, image_size=spec.image_size)
    return found.reading(image_mean=spec.image_mean, image_std=spec.image_std)


def check_encoder(config: Any, encoder: VisionEncoder, width: int) -> None:
    """Refuse an encoder that an autoencoder was not made with.

    Args:
        config: the autoencoder's config.
        encoder: the encoder.
        width: channels of a latent that come from the encoder.

    Raises:
        UserError: naming what differs.
    """
    if config.encoder is None:
        raise UserError("encoder: this autoencoder was made without an encoder and only decodes")
    name = encoder.name_or_path or encoder.family
    if (encoder.hidden_size, encoder.grid_size) != (width, config.latent_size):
        raise UserError(
            f"encoder {name!r} gives latents ({encoder.hidden_size}, {encoder.grid_size}, {encoder.grid_size}), this "
            f"autoencoder has ({width}, {config.latent_size}, {config.latent_size})"
        )
    expected = config.encoder_fingerprint
    if expected is None:
        return
    given = encoder.fingerprint()
    if given != expected:
        raise UserError(
            f"encoder {name!r} has other weights (fingerprint {given[:12]}) than the encoder that this autoencoder's "
            f"statistics and decoder were made with ({expected[:12]}); use that one or train a decoder for this one"
        )


def shall_store(config: Any, encoder: VisionEncoder | None, include_encoder: bool | None) -> bool:
    """Say whether an autoencoder is saved with its encoder's weights; see `save_pretrained` of the autoencoder."""
    if config.encoder is None:
        return False
    if include_encoder is not None:
        return include_encoder
    if config.encoder["name_or_path"] is None:
        return True
    if encoder is None:
        return config.encoder_stored
    from repagen.encoders import FAMILIES

    return FAMILIES[config.encoder["family"]].redistributable


def saved_facts(config: Any, encoder: VisionEncoder | None, stored: bool) -> dict[str, Any]:
    """Return the config entries to save: the encoder's description, its fingerprint and where its weights are."""
    description = dict(config.encoder)
    local = description.get("revision") is None and description.get("name_or_path") is not None
    if stored and local:
        # The folder on this machine means nothing elsewhere, and the weights go along.
        description["name_or_path"] = None
    if not stored and description.get("name_or_path") is None:
        raise UserError("include_encoder=False: this encoder comes from no Hub id or folder; save it along")
    if not stored and local:
        logger.warning(
            "the encoder is saved as a reference to the local folder %s; elsewhere this autoencoder only decodes "
            "(include_encoder=True saves the weights along, where their licence allows it)",
            description["name_or_path"],
        )
    fingerprint = encoder.fingerprint() if encoder is not None else config.encoder_fingerprint
    return {"encoder": description, "encoder_fingerprint": fingerprint, "encoder_stored": stored}


def encoder_licences(config: Any) -> tuple[LicenceFact, ...]:
    """Return the licence of the encoder that an autoencoder's config describes, and what follows from it."""
    from repagen.encoders.families import FAMILIES, licence_fact

    if config.encoder is None:
        return ()
    family, name = FAMILIES[config.encoder["family"]], config.encoder["name_or_path"]
    return (licence_fact(family, name, config.encoder["revision"], config.encoder_stored),)


def save_encoder(encoder: VisionEncoder, folder: Path) -> None:
    """Write an encoder's weights below an autoencoder's folder."""
    from repagen.encoders.backbones import FROZEN_VARIANT

    encoder.save_pretrained(folder / SUBFOLDER, variant=FROZEN_VARIANT)


def _stored_folder(folder: Path) -> Path:
    """Return the sub-folder with the encoder, downloading it if the autoencoder lies in the Hub's cache without it."""
    from repagen.encoders.backbones import FROZEN_VARIANT

    stored = folder / SUBFOLDER
    if any(stored.glob(f"model*.{FROZEN_VARIANT}*")) or any(stored.glob("*.safetensors")):
        return stored
    complete_snapshot(stored, "encoder of")
    return stored

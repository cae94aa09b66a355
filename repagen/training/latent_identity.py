"""Opening an autoencoder, and the hashes of weights and statistics that identify latents and alignment targets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch

from repagen.data import ImageDataset
from repagen.encoders import VisionEncoder
from repagen.errors import UserError, refusing
from repagen.models.autoencoder_base import FrozenEncoderAutoencoder, StandardisedLatents
from repagen.models.fingerprint import hash_tensors
from repagen.models.opening import load_model, refuse_missing_folder

_READING = ("image_size", "layers", "combination", "norm_affine", "image_mean", "image_std")


def open_autoencoder(
    name: str, *, option: str = "autoencoder", subfolder: str | None = None, revision: str | None = None
) -> Any:
    """Load an autoencoder of this library or of diffusers, from a folder or the Hub, in eval mode.

    Args:
        name: the folder or Hub id.
        option: what the user gave the name as, for messages.
        subfolder, revision: where it is in there.

    Raises:
        UserError: nothing that can be loaded is there.
    """
    where = f"{name}, subfolder {subfolder}" if subfolder else name
    allowed = "a folder or Hub id of an autoencoder"
    refuse_missing_folder(name, option, allowed)
    with refusing(f"{option}: {where} cannot be loaded; allowed: {allowed}"):
        autoencoder = load_model(name, subfolder=subfolder, revision=revision)
    if not hasattr(autoencoder, "encode"):
        raise UserError(f"{option}: {where} is a {type(autoencoder).__name__}; allowed: an autoencoder")
    return autoencoder.eval()


def describe_encoder(encoder: VisionEncoder) -> dict[str, Any]:
    """Return name, weights' hash and reading of an encoder, JSON-able."""
    spec = dataclasses.asdict(encoder.spec())
    return {"name": encoder.name_or_path, "weights": encoder.fingerprint(), **{key: spec[key] for key in _READING}}


def describe_autoencoder(autoencoder: Any) -> dict[str, Any]:
    """Return {"name", "class", "encoder", "statistics"} of an autoencoder, the last two hashes.

    They hold what latents depend on: decoders are left out, and a frozen encoder is described by the autoencoder's
    config, without loading it.
    """
    if isinstance(autoencoder, StandardisedLatents):
        name, encoder = _describe_own_encoding(autoencoder)
        statistics = hash_tensors([autoencoder.latents_mean, autoencoder.latents_std])
    else:
        state = autoencoder.state_dict()
        encoder = hash_tensors(state[key] for key in sorted(state) if key.startswith(("encoder.", "quant_conv.")))
        known = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
        statistics = _hash_json({key: autoencoder.config.get(key) for key in known})
        name = autoencoder.config.get("_name_or_path")
    return {"name": name, "class": type(autoencoder).__name__, "encoder": encoder, "statistics": statistics}


def _describe_own_encoding(autoencoder: StandardisedLatents) -> tuple[str | None, str]:
    """Return the name of the frozen encoder, if there is one, and a hash of all that raw latents depend on."""
    facts, tensors = autoencoder.encoding_facts()
    name = None
    if isinstance(autoencoder, FrozenEncoderAutoencoder):
        spec = autoencoder.config.encoder or {}
        name = spec.get("name_or_path")
        facts = [autoencoder.config.encoder_fingerprint, {key: spec.get(key) for key in _READING}, *facts]
    return name, _hash_json([*facts, hash_tensors(tensors)] if tensors else facts)


def refuse_non_finite(values: torch.Tensor, indices: torch.Tensor, dataset: ImageDataset) -> None:
    """Stop at a sample whose values (B, ...) are not finite, naming it; `indices` (B,) are its places in the dataset.

    Raises:
        UserError: a value is NaN or infinite.
    """
    finite = torch.isfinite(values.flatten(1)).all(1).cpu()
    if not finite.all():
        index = int(indices[~finite][0])
        raise UserError(
            f"{dataset.describe(index)}: its latent is not finite; look at the image, or encode in float32"
        )


def process_group() -> tuple[int, int]:
    """Return (this process, number of processes) of the running process group; (0, 1) without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""The hashes of weights and statistics that identify encoders, latents and generators, wherever they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from repagen.encoders import VisionEncoder
from repagen.models.autoencoder_base import FrozenEncoderAutoencoder, StandardisedLatents
from repagen.models.fingerprint import hash_tensors

_READING = ("image_size", "layers", "combination", "norm_affine", "image_mean", "image_std")


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


def describe_transformer(transformer: Any) -> dict[str, Any]:
    """Return {"class", "weights"} of a generator: a hash of its config and its tensors, whatever their dtype."""
    state = transformer.state_dict()
    facts = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    return {
        "class": type(transformer).__name__,
        "weights": _hash_json([facts, sorted(state), hash_tensors(state[key] for key in sorted(state))]),
    }


def _describe_own_encoding(autoencoder: StandardisedLatents) -> tuple[str | None, str]:
    """Return the name of the frozen encoder, if there is one, and a hash of all that raw latents depend on."""
    facts, tensors = autoencoder.encoding_facts()
    name = None
    if isinstance(autoencoder, FrozenEncoderAutoencoder):
        spec = autoencoder.config.encoder or {}
        name = spec.get("name_or_path")
        facts = [autoencoder.config.encoder_fingerprint, {key: spec.get(key) for key in _READING}, *facts]
    return name, _hash_json([*facts, hash_tensors(tensors)] if tensors else facts)


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

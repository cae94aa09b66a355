"""Hashes of weights, which say whether two autoencoders are one."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import torch

from repagen.encoders.weights import constituents
from repagen.models.autoencoder_base import FrozenEncoderAutoencoder


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Return a sha256 over shapes and float32 values, in the order given."""
    digest = hashlib.sha256()
    for tensor in itertools.chain.from_iterable(map(constituents, tensors)):
        value = tensor.detach().float().cpu().contiguous()
        digest.update(f"{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def autoencoder_sha256(autoencoder: Any) -> str:
    """Return a hash of all weights and statistics of an autoencoder, those of its frozen encoder included.

    Args:
        autoencoder: of this library or of diffusers.

    Raises:
        UserError: when a frozen encoder cannot be loaded.
    """
    state = autoencoder.state_dict()
    own = hash_tensors(state[name] for name in sorted(state))
    if not isinstance(autoencoder, FrozenEncoderAutoencoder):
        return own
    return hashlib.sha256(f"{own} {autoencoder.encoder.fingerprint()}".encode()).hexdigest()

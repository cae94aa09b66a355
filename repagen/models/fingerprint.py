"""Hashes of weights, which say whether two autoencoders are one."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from repagen.models.autoencoder_base import FrozenEncoderAutoencoder


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Return a sha256 over shapes and float32 values, in the order given."""
    digest = hashlib.sha256()
    for tensor in itertools.chain.from_iterable(map(_constituents, tensors)):
        value = tensor.detach().float().cpu().contiguous()
        digest.update(f"{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _constituents(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor itself, or what a quantised one of torchao consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _constituents(getattr(tensor, name))


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

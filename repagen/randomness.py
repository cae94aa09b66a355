"""Randomness as a function of (seed, purpose, indices), never of a running stream.

A draw made here depends on nothing but its key, so it is the same for every batch size, worker count, process count
and after every restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def derived_seed(seed: int, purpose: str, *indices: int) -> int:
    """Hash a run's seed, the purpose of a draw and its indices to a 63-bit seed."""
    key = "/".join([str(seed), purpose, *map(str, indices)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator for one purpose and one set of indices, for example one training sample of one step."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, *indices))


def normal_per_sample(generators: Sequence[torch.Generator], shape: Sequence[int]) -> torch.Tensor:
    """Draw standard normal noise (B, *shape) float32, row i from generator i, on the generators' device."""
    return torch.stack([torch.randn(*shape, generator=g, device=g.device) for g in generators])


def uniform_per_sample(generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw uniform numbers (B,) float32 in [0, 1), number i from generator i, on the generators' device."""
    return torch.stack([torch.rand((), generator=g, device=g.device) for g in generators])

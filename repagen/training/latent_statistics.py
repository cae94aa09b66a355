"""Exact latent statistics of a dataset: mean and population variance of every element of the latent.

The published script keeps a running average that depends on the order of the images (RAE's `calculate_stat.py`). Here
every latent counts once, in float64: the dataset is cut into 64 fixed stretches, each is summed up in order, and the
stretches are merged in order (Chan, Golub & LeVeque 1983). The result therefore does not depend on batch size
or process count beyond the rounding of the encoder itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from repagen.data import ImageDataset, load_in_order
from repagen.errors import UserError
from repagen.files import sync_file, sync_folder
from repagen.models.autoencoder_base import FrozenEncoderAutoencoder, StandardisedLatents
from repagen.models.identity import describe_autoencoder
from repagen.models.latents import latent_shape, require_independent_latents
from repagen.training.latent_identity import process_group, refuse_non_finite

_STRETCHES = 64
_METADATA_KEY = "repagen_statistics"


@dataclass(frozen=True)
class ElementMoments:
    """Number of samples, mean and summed squared deviation of every element, float64."""

    count: int
    mean: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> ElementMoments:
        """Return the moments of values (B, ...)."""
        values = values.double()
        mean = values.mean(0)
        return cls(len(values), mean, (values - mean).square().sum(0))

    def merge(self, other: ElementMoments) -> ElementMoments:
        """Return the moments of both sets together (Chan et al. 1983, eq. 2.1)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        squares = self.squares + other.squares + shift.square() * (self.count * other.count / count)
        return ElementMoments(count, mean, squares)

    def of_channels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and population variance (C,) of the channels of elements (C, h, w)."""
        mean = self.mean.mean((1, 2))
        within, between = self.squares / self.count, (self.mean - mean.view(-1, 1, 1)).square()
        return mean, (within + between).mean((1, 2))


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of a dataset's raw (not standardised) latents.

    Attributes:
        mean: float64, (C, h, w), or (C, 1, 1) for an autoencoder that is standardised per channel.
        variance: of the same shape, population variance.
        images: number of images averaged; where mirrored images count too, each gave two latents.
        encoder: fingerprint of the encoder, or a hash of all weights that encode.
        dataset: fingerprint of the dataset.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    images: int
    encoder: str
    dataset: str

    def save(self, path: Path) -> None:
        """Write a safetensors file with `mean`, `var` and the rest as metadata, whole or not at all."""
        # One key: safetensors writes several in an order that changes from run to run.
        facts = json.dumps({"images": self.images, "encoder": self.encoder, "dataset": self.dataset})
        temporary = path.with_name(f".tmp-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": self.mean, "var": self.variance}, temporary, metadata={_METADATA_KEY: facts})
        sync_file(temporary)
        temporary.rename(path)
        sync_folder(path.parent)

    @classmethod
    def load(cls, path: Path) -> LatentStatistics:
        """Read a file written by `save`.

        Raises:
            UserError: the file is missing, damaged or of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})[_METADATA_KEY])
                identity = facts["images"], facts["encoder"], facts["dataset"]
                return cls(file.get_tensor("mean"), file.get_tensor("var"), *identity)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: no statistics of `repagen stats` ({error}); run it again") from error


def compute_latent_statistics(
    autoencoder: Any,
    dataset: ImageDataset,
    *,
    batch_size: int = 32,
    flips: bool = False,
    num_workers: int = 0,
) -> LatentStatistics:
    """Compute the statistics of a dataset's raw latents; the autoencoder is left as it is.

    Under a process group every process computes its share and all return the same result.

    Args:
        autoencoder: one of this library or an `AutoencoderKL`, on its device; statistics it already has do not
            matter.
        dataset: the images; they are read once, without random augmentation, and bad ones are left out.
        batch_size: images per forward pass.
        flips: count the mirrored image as well, as training with random flips shows both.
        num_workers: loader processes.

    Raises:
        UserError: too many bad images, an image whose latent is not finite, an autoencoder of another kind, one
            that takes images of another size, or one whose latents depend on their batch.
    """
    require_independent_latents(autoencoder, "autoencoder")
    encode, shape = _raw_encoding(autoencoder, dataset.config.image_size)
    total = latent_moments(
        encode,
        shape,
        dataset,
        device=autoencoder.device,
        batch_size=batch_size,
        flips=flips,
        num_workers=num_workers,
    )
    mean, variance = _mean_and_variance(autoencoder, total)
    images = total.count // (2 if flips else 1)
    return LatentStatistics(mean.cpu(), variance.cpu(), images, _encoder_identity(autoencoder), dataset.fingerprint())


def _raw_encoding(
    autoencoder: Any, image_size: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, int, int]]:
    """Return what makes raw latents of images, and their shape; of a KL autoencoder the posterior's moments."""
    channels, height, width = latent_shape(autoencoder, image_size)
    if isinstance(autoencoder, StandardisedLatents):
        return autoencoder.raw_latents, (channels, height, width)
    if isinstance(autoencoder, AutoencoderKL):
        return partial(_posterior, autoencoder), (2 * channels, height, width)
    raise UserError(
        f"statistics: {type(autoencoder).__name__} keeps them in another form; read it with "
        "RepresentationAutoencoder.from_diffusers first"
    )


@torch.no_grad()
def _posterior(autoencoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Return mean and variance (B, 2C, h, w) of a KL autoencoder's posterior."""
    posterior = autoencoder.encode(images.to(autoencoder.dtype) * 2 - 1, return_dict=False)[0]
    return torch.cat([posterior.mean, posterior.var], dim=1).float()


def _mean_and_variance(autoencoder: Any, moments: ElementMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and variance of raw latents in the shape in which the autoencoder keeps them."""
    if isinstance(autoencoder, StandardisedLatents) and autoencoder.latents_mean.shape[1:] != (1, 1):
        return moments.mean, moments.squares / moments.count
    mean, variance = (value.view(-1, 1, 1) for value in moments.of_channels())
    if isinstance(autoencoder, AutoencoderKL):
        # Of draws, in closed form: var(z) = var(posterior mean) + mean(posterior variance).
        mean, posterior_variance = mean.chunk(2)
        variance = variance.chunk(2)[0] + posterior_variance
    return mean, variance


def _encoder_identity(autoencoder: Any) -> str:
    if isinstance(autoencoder, FrozenEncoderAutoencoder) and not autoencoder.encoding_facts()[1]:
        return autoencoder.encoder.fingerprint()
    return describe_autoencoder(autoencoder)["encoder"]


def set_latent_statistics(autoencoder: Any, statistics: LatentStatistics) -> None:
    """Put statistics into an autoencoder: into its buffers, or into the config of an `AutoencoderKL`.

    Raises:
        UserError: they are of another shape.
    """
    if isinstance(autoencoder, StandardisedLatents):
        autoencoder.set_statistics(statistics.mean, statistics.variance)
        return
    config: Any = autoencoder.config
    if len(statistics.mean) != config.latent_channels:
        raise UserError(
            f"latent statistics: of {len(statistics.mean)} channels, but this autoencoder's latents have "
            f"{config.latent_channels}"
        )
    autoencoder.register_to_config(
        latents_mean=statistics.mean.flatten().tolist(),
        latents_std=statistics.variance.sqrt().flatten().tolist(),
        scaling_factor=1.0,
        shift_factor=None,
    )


def latent_moments(
    encode: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    dataset: ImageDataset,
    *,
    device: torch.device,
    batch_size: int = 32,
    flips: bool = False,
    num_workers: int = 0,
) -> ElementMoments:
    """Compute the moments of what `encode` makes of a dataset's images; see `compute_latent_statistics`.

    Args:
        encode: images (B, 3, H, W) in [0, 1] on the device => (B, *shape).
        shape: of one latent.
        dataset, batch_size, flips, num_workers: see `compute_latent_statistics`.
        device: where it encodes.

    Raises:
        UserError: too many bad images, or an image whose latent is not finite.
    """
    rank, processes = process_group()
    bounds = [number * len(dataset) // _STRETCHES for number in range(_STRETCHES + 1)]
    own: dict[int, ElementMoments | None] = {}
    progress = tqdm(total=bounds[-1], desc="statistics", unit="image", disable=rank != 0)
    for number in range(rank, _STRETCHES, processes):
        stretch = range(bounds[number], bounds[number + 1])
        batches = load_in_order(dataset, stretch, batch_size, num_workers=num_workers)
        own[number] = _sum_up(encode, device, dataset, batches, flips)
        progress.update(len(stretch))
    progress.close()
    return _merge_stretches(own, rank, processes, shape, device)


def _sum_up(
    encode: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    dataset: ImageDataset,
    batches: Iterator[dict[str, Any]],
    flips: bool,
) -> ElementMoments | None:
    """Return the moments of the raw latents of some batches, None when every image of them is bad."""
    total: ElementMoments | None = None
    for batch in batches:
        images = batch["image"].to(device)
        for view in (images, images.flip(-1)) if flips else (images,):
            latents = encode(view)
            refuse_non_finite(latents, batch["index"], dataset)
            moments = ElementMoments.of(latents)
            total = moments if total is None else total.merge(moments)
    return total


def _merge_stretches(
    own: dict[int, ElementMoments | None], rank: int, processes: int, shape: tuple[int, ...], device: torch.device
) -> ElementMoments:
    """Merge the stretches of all processes in order; every process gets the result."""
    total: ElementMoments | None = None
    for number in range(_STRETCHES):
        moments = own[number] if processes == 1 else _share(own.get(number), number % processes, rank, shape, device)
        if moments is not None:
            total = moments if total is None else total.merge(moments)
    if total is None:
        raise UserError("data: no readable image; statistics need at least one")
    return total


def _share(
    own: ElementMoments | None, owner: int, rank: int, shape: tuple[int, ...], device: torch.device
) -> ElementMoments | None:
    """Send one stretch's moments from the process that owns it to all."""
    packed = torch.zeros(2 * math.prod(shape) + 1, dtype=torch.float64, device=device)
    if rank == owner and own is not None:
        packed = torch.cat([own.mean.flatten(), own.squares.flatten(), packed.new_tensor([own.count])])
    torch.distributed.broadcast(packed, src=owner)
    count = int(packed[-1])
    mean, squares = packed[:-1].view(2, *shape)
    return ElementMoments(count, mean, squares) if count else None

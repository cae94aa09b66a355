"""Matching scalars of SVG's autoencoder, and the statistics of latents matched by them, exactly and in one pass."""

from __future__ import annotations

from functools import partial

from repagen.data import ImageDataset
from repagen.models.autoencoder_svg import SVGAutoencoder
from repagen.models.identity import describe_autoencoder
from repagen.training.latent_statistics import LatentStatistics, latent_moments


def calibrate_to_dataset(
    autoencoder: SVGAutoencoder,
    dataset: ImageDataset,
    *,
    batch_size: int = 32,
    flips: bool = False,
    num_workers: int = 0,
) -> LatentStatistics:
    """Match an SVG autoencoder to a dataset as if this were one batch, and compute the statistics of its latents.

    With `matching="running"` the scalars become the autoencoder's. Its statistics are left as they are. Matching is
    affine per channel, so that one pass over the unmatched latents gives both.

    Args:
        autoencoder: in eval mode, on its device.
        dataset, batch_size, flips, num_workers: see `compute_latent_statistics`; nor does the result depend on them
            otherwise.

    Raises:
        UserError: too many bad images, or an image whose latent is not finite.
    """
    shape, width = autoencoder.latent_shape, autoencoder.encoder_width
    moments = latent_moments(
        partial(autoencoder.raw_latents, matching="none"),
        shape,
        dataset,
        device=autoencoder.device,
        batch_size=batch_size,
        flips=flips,
        num_workers=num_workers,
    )
    mean, variance = moments.of_channels()
    if autoencoder.config.use_residual and autoencoder.config.matching != "none":
        match = autoencoder.distribution_matching
        tokens = moments.count * shape[1] * shape[2]
        scalars = match.of_channels(mean, (variance * tokens / (tokens - 1)).sqrt(), width)
        if autoencoder.config.matching == "running":
            match.set(scalars)
        lower, upper = mean[width:], mean[width:] + variance[width:].sqrt()
        mean[width:] = match(lower, scalars).double()
        variance[width:] = (match(upper, scalars).double() - mean[width:]).square()
    images = moments.count // (2 if flips else 1)
    identity = describe_autoencoder(autoencoder)["encoder"]
    mean, variance = (value.view(-1, 1, 1).cpu() for value in (mean, variance))
    return LatentStatistics(mean, variance, images, identity, dataset.fingerprint())

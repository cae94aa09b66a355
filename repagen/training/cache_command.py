"""`repagen cache`: latents and alignment targets of a dataset to safetensors shards, to train without encoders."""

from __future__ import annotations

import argparse
from typing import get_args

from repagen.data import data_config_from_words, open_image_dataset
from repagen.models.latents import latent_shape, require_independent_latents
from repagen.training.dataset_commands import add_dataset_arguments, command_device, positive
from repagen.training.frozen import load_target_encoder
from repagen.training.generator_config import AlignmentTargetConfig
from repagen.training.latent_cache import CacheConfig, ShardType, cache_latents
from repagen.training.latent_identity import open_autoencoder, process_group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    defaults = CacheConfig()
    add_dataset_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder of the cache; the same again continues"
    )
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="ID",
        help="alignment encoder whose tokens are stored as targets, folder or Hub id; may be repeated",
    )
    parser.add_argument(
        "--target-grid",
        type=int,
        metavar="TOKENS",
        help="rows and columns of the targets, as many as the generator has tokens: rows of the latent divided by the "
        "generator's patch size (default: rows of the latent)",
    )
    parser.add_argument(
        "--shard-rows", type=positive, default=defaults.shard_rows, help="images per shard (%(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=get_args(ShardType), default=defaults.dtype, help="stored type (%(default)s)"
    )


def run(args: argparse.Namespace) -> str | None:
    """Write the cache. Mirrored images are stored too where data.horizontal_flip=true.

    Raises:
        UserError: dataset, autoencoder or an encoder cannot be used, an image is bad, or the folder is taken.
    """
    dataset = open_image_dataset(data_config_from_words(args.data), several_sizes=True)
    config = CacheConfig(
        batch_size=args.batch_size,
        shard_rows=args.shard_rows,
        flips=dataset.config.horizontal_flip,
        dtype=args.dtype,
        num_workers=args.num_workers,
    )
    with command_device() as device:
        autoencoder = open_autoencoder(args.autoencoder, option="--autoencoder").to(device)
        require_independent_latents(autoencoder, "--autoencoder")
        latent_grid = latent_shape(autoencoder, dataset.config.image_size)[1:]  # refuses images of another size
        grid = (args.target_grid, args.target_grid) if args.target_grid else latent_grid
        encoders = [
            load_target_encoder(AlignmentTargetConfig(encoder=name), grid, "--encoder").to(device)
            for name in args.encoder
        ]
        shards = cache_latents(autoencoder, dataset, args.output, encoders=encoders, config=config)
        if process_group()[0] != 0:
            return None
    bad = f", {len(dataset) - len(shards)} bad images left out" if len(shards) < len(dataset) else ""
    shape = "x".join(map(str, shards.latent_shape))
    return (
        f"{args.output}: {len(shards)} latents {shape} in {len(shards.manifest['shards'])} shards{bad}; train with "
        f"data.kind=latents data.path={args.output}"
    )

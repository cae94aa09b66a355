"""`repagen cache`: latents, captions and alignment targets of a dataset to shards, to train without encoders.

With `--text-encoder` the captions are encoded as well, into a prompt cache of its own: one cache of latents serves any
text encoder, and a caption that many images share is kept once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

import torch

from repagen.data import ImageDataset, data_config_from_words, open_image_dataset
from repagen.encoders.prompt_cache import CachedTextEncoder
from repagen.encoders.text import TextEncoder
from repagen.errors import UserError, naming
from repagen.models.latents import latent_shape, require_independent_latents
from repagen.training.dataset_commands import add_dataset_arguments, command_device, positive
from repagen.training.frozen import encoder_source, load_target_encoder
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

    _add_text_arguments(parser)


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("captions", "as in the `text` section of text-to-image training")
    group.add_argument("--prompt-cache", metavar="FOLDER", help="where their embeddings are kept; `text.cache` then")
    group.add_argument(
        "--text-encoder", action="append", default=[], metavar="ID", help="folder or Hub id; may be repeated"
    )
    group.add_argument("--hidden-layer", type=int, default=-1, help="whose output is taken (%(default)s: the last)")
    group.add_argument("--max-length", type=positive, metavar="TOKENS", help="of a prompt (default: the family's)")
    group.add_argument("--template", metavar="TEXT", help="words around each prompt, with {prompt} in its place")


def run(args: argparse.Namespace) -> str | None:
    """Write the cache. Mirrored images are stored too where data.horizontal_flip=true.

    Raises:
        UserError: dataset, autoencoder or an encoder cannot be used, an image is bad, or the folder is taken.
    """
    if bool(args.text_encoder) != bool(args.prompt_cache):
        raise UserError("--text-encoder and --prompt-cache go together: which encoder, and where its embeddings go")
    dataset = open_image_dataset(data_config_from_words(args.data), several_sizes=True)
    config = CacheConfig(
        batch_size=args.batch_size,
        shard_rows=args.shard_rows,
        flips=dataset.config.horizontal_flip,
        dtype=args.dtype,
        num_workers=args.num_workers,
    )
    if args.text_encoder and not dataset.has_captions:
        raise UserError("--text-encoder: the images have no captions; set data.captions={} where they are beside them")
    with command_device() as device:
        if args.text_encoder:  # before the latents: it is large, and gone by then
            _keep_prompts(args, dataset, device)
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
    channels, *own = shards.latent_shape
    sizes: list[Sequence[int]] = [*shards.bucket_sizes] or [own]
    shapes = " and ".join("x".join(map(str, (channels, *size))) for size in sizes)
    text = f" text.cache={args.prompt_cache}" if args.prompt_cache else ""
    return (
        f"{args.output}: {len(shards)} latents {shapes} in {len(shards.manifest['shards'])} shards{bad}; train with "
        f"data.kind=latents data.path={args.output}{text}"
    )


def _keep_prompts(args: argparse.Namespace, dataset: ImageDataset, device: torch.device) -> None:
    """Encode all captions; under a process group every process its share."""
    with naming({"": "--text-encoder: "}):
        encoder = TextEncoder.from_encoder(
            [encoder_source(name) for name in args.text_encoder],
            hidden_layer=args.hidden_layer,
            max_length=args.max_length,
            template=args.template,
        )
    rank, processes = process_group()
    texts = [text for index in range(rank, len(dataset), processes) for text in dataset.captions(index).texts]
    with naming({"": "--prompt-cache: "}):
        CachedTextEncoder(args.prompt_cache, encoder.to(device)).fill(texts, args.batch_size)

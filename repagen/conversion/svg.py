"""Official SVG autoencoders as `SVGAutoencoder`, and back."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repagen.conversion.checkpoint_file import read_state_dict, write_state_dict
from repagen.conversion.dinov3 import ENCODER_PREFIX, dinov3_encoder, official_dinov3_state
from repagen.conversion.layout import Layout, Row, load_exactly, official_state
from repagen.conversion.ldm import ConvSizes, as_convolutions, as_matrices, decoder_rows
from repagen.conversion.source import Source
from repagen.conversion.statistics import StatisticsFormat, read_statistics
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.models.autoencoder_svg import SVGAutoencoder

SVG_ARGUMENTS = frozenset(
    {
        "ddconfig", "dinoconfig", "lossconfig", "embed_dim", "extra_vit_config", "ckpt_path", "ignore_keys",
        "image_key", "colorize_nlabels", "monitor", "use_vf", "proj_fix", "is_train", "dinov3",
    }
)  # fmt: skip
"""Official constructor arguments, and `dinov3`: those of the DINOv3 network, where it is no published one."""

_EXTRA_VIT_ARGUMENTS = ("output_dim", "mask_ratio", "use_outnorm")
# Not in the tensors, and no arguments of the official constructor.
_RESIDUAL_HEADS, _RESIDUAL_DROPOUT = 8, 0.1
# `norm_vit` is made, saved, and never used nor trained: its weights stay as they were made.
_DEAD_PREFIX, _DEAD_WIDTH = "norm_vit.", 32
# Buffers of ours that official files do not hold.
_OWN_PREFIXES = ("latent_statistics.", "distribution_matching.")
_STATISTICS = StatisticsFormat("dinov3_sp_mean", "dinov3_sp_std")


def convert_svg_autoencoder(
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    encoder: str | os.PathLike[str] | VisionEncoder | None = None,
    statistics: str | Path | None = None,
) -> SVGAutoencoder:
    """Read an official SVG autoencoder; latents are matched by their batch, as officially.

    Args:
        path: the Lightning checkpoint, or its state dict. The DINOv3 weights in it become the encoder.
        config: official constructor arguments (`ddconfig`, `extra_vit_config` ...) and `dinov3`, those of the DINOv3
            network; all sizes are read off the tensors, and a value that contradicts them is refused. What the
            tensors do not tell has the published values.
        encoder: a folder, Hub id or `VisionEncoder` in place of the weights in the file, for a file without them or
            to save a reference to the gated ones; it must have the same weights.
        statistics: file of the latents' mean and deviation per channel (`dinov3_sp_stats.pt`): `dinov3_sp_mean` and
            `dinov3_sp_std`, each (1, 1, C), (C, 1, 1) or (C,), and nothing else.

    Returns:
        A `SVGAutoencoder` in eval mode and float32.

    Raises:
        UserError: for a file that is missing or unreadable; tensors that are missing, left over, misshapen or not
            finite, by name; arguments that do not fit; statistics of another width.
    """
    file, options = Path(path), _options(config)
    state = {
        name: tensor
        for name, tensor in as_matrices(read_state_dict(file)).items()
        if not name.startswith(_DEAD_PREFIX)
    }
    inside = {name: tensor for name, tensor in state.items() if name.startswith(ENCODER_PREFIX)}
    trained = {name: tensor for name, tensor in state.items() if name not in inside}
    arguments = _model_arguments(Source(file, trained, options))
    model = SVGAutoencoder(**arguments)
    found = _encoder(Source(file, inside, options), encoder, model)
    if found is not None:
        facts = {"encoder": dataclasses.asdict(found.spec()), "encoder_fingerprint": found.fingerprint()}
        model = SVGAutoencoder(**arguments, **facts)
        model.attach_encoder(found)
    if model.config.use_residual and model.config.mask_probability == 0:
        trained = {"mask_token": torch.zeros_like(model.mask_token), **trained}
    if strange := [name for name in trained if name.startswith(_OWN_PREFIXES)]:
        raise UserError(f"{file}: tensor {strange[0]} left over; no official file holds it")
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_OWN_PREFIXES)}
    load_exactly(model, _layout(model), {**own, **trained}, file)
    if statistics is not None:
        _set_statistics(model, Path(statistics))
    return model.eval()


def export_svg_autoencoder(model: SVGAutoencoder, path: Path) -> None:
    """Write an SVG autoencoder under official names; the encoder's tensors are among them if it has one.

    Tensors that the official code never uses have the values that it makes them with: `norm_vit`, and the masked
    biases of the encoder's keys. Latent statistics lie in a file of their own there and are not written.

    Raises:
        UserError: another model, an encoder that cannot be loaded or is no DINOv3, or a path that cannot be written.
    """
    if not isinstance(model, SVGAutoencoder):
        raise UserError(f"family 'svg_autoencoder' takes a SVGAutoencoder, got a {type(model).__name__}")
    write_state_dict(_official_state(model), path)


def _official_state(model: Any) -> dict[str, torch.Tensor]:
    state = as_convolutions(official_state(model, _layout(model)))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_OWN_PREFIXES)}
    if model.config.use_residual:
        if model.config.mask_probability == 0:
            del state["mask_token"]
        width = model.config.residual_channels + _DEAD_WIDTH
        state |= {f"{_DEAD_PREFIX}weight": torch.ones(width), f"{_DEAD_PREFIX}bias": torch.zeros(width)}
    if model.config.encoder is not None:
        state |= official_dinov3_state(model.encoder)
    return state


def _options(config: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(config or {})
    if unknown := sorted(set(options) - SVG_ARGUMENTS):
        raise UserError(
            f"config: svg_autoencoder has no argument {unknown[0]!r}; allowed are {', '.join(sorted(SVG_ARGUMENTS))}"
        )
    extra = options.get("extra_vit_config") or {}
    if unknown := sorted(set(extra) - set(_EXTRA_VIT_ARGUMENTS)):
        raise UserError(
            f"config:extra_vit_config: no argument {unknown[0]!r}; allowed are {', '.join(_EXTRA_VIT_ARGUMENTS)}"
        )
    return options


def _model_arguments(source: Source) -> dict[str, Any]:
    decoder = ConvSizes(source, "decoder", "up")
    ddconfig = source.config.get("ddconfig") or {}
    decoder.check(ddconfig, "config:ddconfig")
    channels = source.shape("decoder.conv_in.weight", 4)[1]
    residual = _residual_arguments(source, 2 ** (len(decoder.channels) - 1))
    width = channels - residual.get("residual_channels", 0)
    if ddconfig.get("z_channels", channels) != channels or width <= 0:
        raise UserError(
            f"{source.path}: the decoder takes {channels} channels, which do not fit z_channels "
            f"{ddconfig.get('z_channels', channels)} and a residual of {channels - width}"
        )
    grid = ddconfig.get("resolution", 256) // 2 ** (len(decoder.channels) - 1)
    attention = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    return {
        "encoder_channels": width,
        "latent_size": grid,
        "decoder_up_block_types": [attention[has] for has in reversed(decoder.attention)],
        "decoder_block_out_channels": decoder.channels,
        "decoder_layers_per_block": decoder.blocks - 1,
        **residual,
    }


def _residual_arguments(source: Source, patch_size: int) -> dict[str, Any]:
    if not any(name.startswith("extra_vit.") for name in source.state):
        return {"use_residual": False, "matching": "none"}
    extra = source.config.get("extra_vit_config") or {}
    dim, _, patch, _ = source.shape("extra_vit.conv_proj.weight", 4)
    if patch != patch_size:
        raise UserError(f"{source.path}: patches of {patch} px, but the decoder makes {patch_size} px of a token")
    channels = source.shape("extra_vit.heads.2.weight", 2)[0]
    if extra.get("output_dim", channels) != channels:
        raise UserError(
            f"config:extra_vit_config:output_dim: {extra['output_dim']}, but {source.path} holds a residual of "
            f"{channels} channels"
        )
    first = "extra_vit.encoder.layers.encoder_layer_"
    numbers = [int(m[1]) for name in source.state if (m := re.match(rf"{re.escape(first)}(\d+)\.", name))]
    return {
        "residual_channels": channels,
        "residual_hidden_size": dim,
        "residual_num_layers": max(numbers, default=-1) + 1,
        "residual_num_heads": _RESIDUAL_HEADS,
        "residual_intermediate_size": source.shape(f"{first}0.mlp.0.weight", 2)[0],
        "residual_dropout": _RESIDUAL_DROPOUT,
        "latent_size": source.side(source.shape("extra_vit.encoder.pos_embedding", 3)[1] - 1),
        "mask_probability": extra.get("mask_ratio", 0.1) if "mask_token" in source.state else 0.0,
        "matching": "batch" if extra.get("use_outnorm", True) else "none",
    }


def _encoder(
    source: Source,
    given: str | os.PathLike[str] | VisionEncoder | None,
    model: SVGAutoencoder,
) -> VisionEncoder | None:
    """The encoder: the given one, checked against the file's weights, or these."""
    grid = model.config.latent_size
    inside = None
    if source.state:
        side = grid * source.shape(f"{ENCODER_PREFIX}patch_embed.proj.weight", 4)[2]
        inside = dinov3_encoder(source, source.config.get("dinov3") or {}, side)
    if given is None:
        return inside
    other = given if isinstance(given, VisionEncoder) else VisionEncoder.from_pretrained(given, grid_size=grid)
    if inside is not None and inside.fingerprint() != other.fingerprint():
        name = other.name_or_path or other.family
        raise UserError(
            f"encoder: {name} has other weights than the encoder in {source.path}; leave it out, or give that one"
        )
    return other


def _layout(model: SVGAutoencoder) -> Layout:
    levels, blocks = len(model.config.decoder_block_out_channels), model.config.decoder_layers_per_block + 1
    rows = decoder_rows("decoder", "decoder", levels, blocks)
    return Layout(outer=[*rows, Row("residual_encoder.network", "extra_vit")], stacks=())


def _set_statistics(model: SVGAutoencoder, path: Path) -> None:
    channels = model.latent_shape[0]
    mean, std = read_statistics(path, _STATISTICS, [(1, 1, channels), (channels, 1, 1), (channels,)])
    assert mean is not None and std is not None
    model.set_statistics(mean.view(-1, 1, 1), std=std.view(-1, 1, 1))

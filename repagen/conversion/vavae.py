"""VA-VAE (arXiv 2501.01423, LightningDiT's tokenizer) as diffusers' `AutoencoderKL`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL

from repagen.conversion.checkpoint_file import read_state_dict, write_state_dict
from repagen.conversion.layout import Layout, load_exactly, official_state
from repagen.conversion.ldm import (
    DDCONFIG_KEYS,
    NORM_GROUPS,
    ConvSizes,
    as_convolutions,
    as_matrices,
    decoder_rows,
    encoder_rows,
)
from repagen.conversion.source import Source
from repagen.conversion.statistics import StatisticsFormat, read_statistics
from repagen.errors import UserError

VAVAE_ARGUMENTS = frozenset(
    {
        "ddconfig", "lossconfig", "embed_dim", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor",
        "use_vf", "reverse_proj", "proj_fix", "use_variational", "model_type",
    }
)  # fmt: skip
"""Official constructor arguments, of training and of LightningDiT's tokenizer; the latter takes ddconfig's too."""

# The losses, and the alignment with a foundation model that VA-VAE is trained with.
_TRAINING_PREFIXES = ("foundation_model.", "linear_proj.")
_STATISTICS = StatisticsFormat("mean", "std")


def convert_vavae(
    path: str | Path, config: Mapping[str, Any] | None = None, *, statistics: str | Path | None = None
) -> AutoencoderKL:
    """Read an official VA-VAE.

    Args:
        path: the checkpoint; the losses and the foundation model in it are dropped.
        config: official constructor arguments; all sizes are read off the tensors, and a value that contradicts them
            is refused.
        statistics: file of the latents' `mean` and `std` (`latents_stats.pt`), each (1, C, 1, 1), (C, 1, 1) or (C,),
            and nothing else; they become `latents_mean` and `latents_std`. LightningDiT's generators need them.

    Returns:
        An `AutoencoderKL` in eval mode and float32, with scaling factor 1.

    Raises:
        UserError: for a file that is missing or unreadable; tensors that are missing, left over, misshapen or not
            finite, by name; arguments that do not fit; statistics of another width.
    """
    file, options = Path(path), dict(config or {})
    if unknown := sorted(set(options) - VAVAE_ARGUMENTS - DDCONFIG_KEYS):
        known = ", ".join(sorted(VAVAE_ARGUMENTS | DDCONFIG_KEYS))
        raise UserError(f"config: vavae has no argument {unknown[0]!r}; allowed are {known}")
    state = as_matrices(read_state_dict(file))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(_TRAINING_PREFIXES)}
    model: Any = AutoencoderKL(**_model_arguments(Source(file, state, options)))
    load_exactly(model, _layout(model), state, file)
    if statistics is not None:
        _set_statistics(model, Path(statistics))
    return model.eval()


def export_vavae(model: AutoencoderKL, path: Path) -> None:
    """Write an `AutoencoderKL` under the names of LDM. Statistics lie in a file of their own there.

    Raises:
        UserError: another model, or one that LDM's encoder and decoder cannot express; a path that cannot be written.
    """
    if not isinstance(model, AutoencoderKL):
        raise UserError(f"family 'vavae' takes an AutoencoderKL, got a {type(model).__name__}")
    module: Any = model
    config = module.config
    wanted = {
        "norm_num_groups": NORM_GROUPS, "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True,
        "use_post_quant_conv": True,
    }  # fmt: skip
    for key, value in wanted.items():
        if config[key] != value:
            raise UserError(f"family 'vavae' has autoencoders with {key}={value!r} only; this one has {config[key]!r}")
    write_state_dict(as_convolutions(official_state(module, _layout(module))), path)


def _model_arguments(source: Source) -> dict[str, Any]:
    encoder, decoder = ConvSizes(source, "encoder", "down"), ConvSizes(source, "decoder", "up")
    flat = {key: value for key, value in source.config.items() if key in DDCONFIG_KEYS}
    ddconfig = {**(source.config.get("ddconfig") or {}), **flat}
    decoder.check(ddconfig, "config:ddconfig")
    if encoder.channels != decoder.channels or encoder.blocks + 1 != decoder.blocks:
        raise UserError(
            f"{source.path}: the encoder's levels {encoder.channels} of {encoder.blocks} blocks do not mirror the "
            f"decoder's {decoder.channels} of {decoder.blocks}"
        )
    channels = source.shape("decoder.conv_in.weight", 4)[1]
    moments, embedded = source.shape("quant_conv.weight", 4)[0], source.shape("post_quant_conv.weight", 4)[1]
    if moments != 2 * channels or embedded != channels:
        raise UserError(
            f"{source.path}: quant_conv gives {moments} channels and post_quant_conv takes {embedded}, but the "
            f"decoder takes {channels}; only a latent as wide as the decoder's input, with a variance, is supported"
        )
    for key in ("embed_dim", "z_channels"):
        given = {**ddconfig, **source.config}.get(key, channels)
        if given != channels:
            raise UserError(f"config:{key}: {given}, but {source.path} has latents of {channels} channels")
    down, up = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    return {
        "down_block_types": tuple(down[has] for has in encoder.attention),
        "up_block_types": tuple(up[has] for has in reversed(decoder.attention)),
        "block_out_channels": tuple(decoder.channels),
        "layers_per_block": encoder.blocks,
        "latent_channels": channels,
        "norm_num_groups": NORM_GROUPS,
        "sample_size": ddconfig.get("resolution", 256),
        "scaling_factor": 1.0,
    }


def _layout(model: Any) -> Layout:
    levels, blocks = len(model.config.block_out_channels), model.config.layers_per_block
    rows = encoder_rows("encoder", "encoder", levels, blocks) + decoder_rows("decoder", "decoder", levels, blocks + 1)
    return Layout(outer=rows, stacks=())


def _set_statistics(model: Any, path: Path) -> None:
    channels = model.config.latent_channels
    mean, std = read_statistics(path, _STATISTICS, [(1, channels, 1, 1), (channels, 1, 1), (channels,)])
    assert mean is not None and std is not None
    model.register_to_config(
        latents_mean=mean.flatten().double().tolist(), latents_std=std.flatten().double().tolist()
    )

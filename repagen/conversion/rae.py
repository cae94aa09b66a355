"""Official RAE autoencoders and diffusers' `AutoencoderRAE` as `RepresentationAutoencoder`, and back.

Decoder tensors keep the names of diffusers' class; the official names differ in the attention only.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderRAE

from repagen.conversion.checkpoint_file import _read as read_checkpoint
from repagen.conversion.checkpoint_file import read_state_dict
from repagen.encoders import EncoderSpec, VisionEncoder
from repagen.encoders.files import read_json
from repagen.encoders.vision import check_image_size
from repagen.errors import UserError
from repagen.models.autoencoder_representation import DECODER_SIZES, VARIANCE_EPSILON, RepresentationAutoencoder

_ATTENTION_NAMES = (
    ("attention.attention.query.", "attention.to_q."),
    ("attention.attention.key.", "attention.to_k."),
    ("attention.attention.value.", "attention.to_v."),
    ("attention.output.dense.", "attention.to_out.0."),
)
# Decoder width => number of heads of the published decoders; shapes do not tell the heads.
_HEADS = {size["decoder_hidden_size"]: size["decoder_num_attention_heads"] for size in DECODER_SIZES.values()}
# Keys of RAE's `stage_1.params` that change the result; the others name classes and paths, which are arguments here.
_USED_KEYS = ("encoder_input_size", "decoder_patch_size", "noise_tau", "eps", "reshape_to_2d")
_PATH_KEYS = (
    "encoder_cls", "encoder_config_path", "encoder_params", "decoder_config_path", "pretrained_decoder_path",
    "normalization_stat_path",
)  # fmt: skip


def convert_rae(
    decoder_path: str | Path,
    *,
    encoder: str | os.PathLike[str] | VisionEncoder | None,
    decoder_config: str | Path | Mapping[str, Any] | None = None,
    statistics: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> RepresentationAutoencoder:
    """Read an official RAE autoencoder.

    Args:
        decoder_path: `.pt` or `.safetensors` with the decoder (`model.pt` of RAE-collections), or a stage-1 training
            file, of which the averaged weights are taken.
        encoder: the vision encoder: a folder, a Hub id, or a `VisionEncoder`; None gives an autoencoder that only
            decodes, and whose decoder's output is taken as pixels.
        decoder_config: folder of the decoder's `config.json`, that file, or its values. It is needed for the number of
            heads of a width that is not published; all sizes are read off the tensors, and a value that contradicts
            them is refused. (The file's `"patch_size": "SHOULD BE RELOADED"` is no number and is ignored, as
            officially.)
        statistics: file of the latents' `mean` and `var`, each (C, h, w) or None.
        config: official constructor arguments; `noise_tau` is used (0.8 by default), sizes are checked, paths ignored.
        revision: commit, tag or branch of the encoder on the Hub.

    Returns:
        A `RepresentationAutoencoder` in eval mode and float32, with the position table of the file.

    Raises:
        UserError: for a file that is missing or unreadable; tensors that are missing, left over, misshapen or not
            finite, by name; an encoder that does not fit.
    """
    path = Path(decoder_path)
    state = _decoder_state(read_state_dict(path))
    sizes = _decoder_sizes(state, _decoder_config(decoder_config), path)
    options = _options(config)
    loaded = _encoder(encoder, sizes, revision, options)
    facts: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if loaded is not None:
        facts = {
            "encoder": dataclasses.asdict(loaded.spec()),
            "encoder_fingerprint": loaded.fingerprint(),
            "image_mean": loaded.image_mean,
            "image_std": loaded.image_std,
        }
    model = RepresentationAutoencoder(**sizes, **facts, noise_tau=options.get("noise_tau", 0.8))
    _load_decoder(model, state, path)
    if loaded is not None:
        model.attach_encoder(loaded)
    if statistics is not None:
        _set_statistics(model, Path(statistics))
    return model.eval()


def from_diffusers(source: str | os.PathLike[str] | AutoencoderRAE, **kwargs: Any) -> RepresentationAutoencoder:
    """Read a diffusers `AutoencoderRAE`.

    Its standard deviation and the 1e-5 it adds once more become one number, so that outputs are equal to diffusers'.
    The position table is the one diffusers computes (a learned one is lost there already).

    Args:
        source: a folder, a Hub id, or the model.
        kwargs: of `AutoencoderRAE.from_pretrained`.

    Raises:
        UserError: for an encoder of SigLIP2, which diffusers cannot build with transformers 5, or a scaling factor.
    """
    loaded: Any = source
    if not isinstance(source, AutoencoderRAE):
        _refuse_siglip(AutoencoderRAE.load_config(source, **kwargs), f"{os.fspath(source)}/config.json")
        loaded = AutoencoderRAE.from_pretrained(source, **kwargs)
    old = loaded.config
    if old.scaling_factor != 1.0:
        raise UserError(f"config.json:scaling_factor: {old.scaling_factor} is not supported, only 1.0")
    encoder = _encoder_of(loaded)
    model = RepresentationAutoencoder(
        encoder=dataclasses.asdict(encoder.spec()),
        encoder_fingerprint=encoder.fingerprint(),
        latent_channels=old.encoder_hidden_size,
        latent_size=round(loaded.num_patches**0.5),
        decoder_patch_size=old.patch_size,
        decoder_hidden_size=old.decoder_hidden_size,
        decoder_num_hidden_layers=old.decoder_num_hidden_layers,
        decoder_num_attention_heads=old.decoder_num_attention_heads,
        decoder_intermediate_size=old.decoder_intermediate_size,
        image_mean=encoder.image_mean,
        image_std=encoder.image_std,
        noise_tau=old.noise_tau,
    )
    state = {key: value.float() for key, value in loaded.decoder.state_dict().items()}
    state["decoder_pos_embed"] = loaded.decoder.decoder_pos_embed.float()
    _load_decoder(model, state, Path("AutoencoderRAE"))
    model.latents_mean.copy_(loaded._latents_mean.expand(model.latent_shape))
    model.latents_std.copy_((loaded._latents_std + VARIANCE_EPSILON).expand(model.latent_shape))
    model.attach_encoder(encoder)
    return model.eval()


def to_diffusers(model: RepresentationAutoencoder) -> AutoencoderRAE:
    """Write as a diffusers `AutoencoderRAE`, with equal outputs.

    Raises:
        UserError: for what that class cannot express: other encoders than DINOv2 with four registers and MAE, several
            layers, attention heads of another width than 64, a position table other than the one it computes.
    """
    encoder = model.encoder
    kind = _diffusers_kind(model, encoder)
    old: Any = AutoencoderRAE(
        encoder_type=kind,
        encoder_hidden_size=encoder.hidden_size,
        encoder_patch_size=encoder.patch_size,
        encoder_num_hidden_layers=encoder.backbone.num_layers,
        encoder_input_size=encoder.image_size,
        patch_size=model.config.decoder_patch_size,
        decoder_hidden_size=model.config.decoder_hidden_size,
        decoder_num_hidden_layers=model.config.decoder_num_hidden_layers,
        decoder_num_attention_heads=model.config.decoder_num_attention_heads,
        decoder_intermediate_size=model.config.decoder_intermediate_size,
        encoder_norm_mean=list(encoder.image_mean),
        encoder_norm_std=list(encoder.image_std),
        noise_tau=model.config.noise_tau,
        # diffusers keeps statistics in its config too, and adds its own 1e-5 to the standard deviation.
        latents_mean=_config_statistic(model.latents_mean),
        latents_std=_config_statistic(model.latents_std - VARIANCE_EPSILON),
    )
    state = {key: value.float().cpu() for key, value in model.decoder.state_dict().items()}
    table = state.pop("decoder_pos_embed")
    if not torch.allclose(table, old.decoder.decoder_pos_embed, atol=1e-6):
        raise UserError(
            "to_diffusers: AutoencoderRAE computes its position table as if the grid were 16 x 16 and reads none, so "
            f"a learned table or a grid of {model.config.latent_size} cannot be kept"
        )
    old.decoder.load_state_dict(state)
    _refuse_other_architecture(encoder, old.encoder.config.to_dict())
    weights = {key: value.float().cpu() for key, value in encoder.backbone.model.state_dict().items()}
    _load_encoder(old.encoder, weights)
    return old.eval()


def _config_statistic(value: torch.Tensor) -> list[Any]:
    """A statistic as nested lists, one number where it is the same everywhere (5 MB of JSON otherwise)."""
    value = value.float().cpu()
    same = bool((value == value.flatten()[0]).all())
    return value.flatten()[:1].tolist() if same else value.tolist()


def _decoder_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    whole = any(key.startswith("decoder.decoder_") for key in state)
    bare = {
        key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.") or not whole
    }
    renamed = {}
    for key, value in bare.items():
        for official, ours in _ATTENTION_NAMES:
            key = key.replace(official, ours)
        renamed[key] = value.float()
    return renamed


def _decoder_config(source: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if source is None or isinstance(source, Mapping):
        return source or {}
    path = Path(source)
    return read_json(path / "config.json" if path.is_dir() else path)


def _decoder_sizes(state: Mapping[str, torch.Tensor], given: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Read all sizes but the heads off the tensors; refuse a config that says otherwise."""
    first = "decoder_layers.0.intermediate.dense.weight"
    for key in ("decoder_embed.weight", "decoder_pos_embed", "decoder_pred.weight", first):
        if key not in state:
            raise UserError(f"{path}: the tensor {key} is missing; this is no RAE decoder")
    width, channels = state["decoder_embed.weight"].shape
    layers = {int(match[1]) for key in state if (match := re.match(r"decoder_layers\.(\d+)\.", key))}
    sizes = {
        "latent_channels": channels,
        "latent_size": round((state["decoder_pos_embed"].shape[1] - 1) ** 0.5),
        "decoder_patch_size": round((state["decoder_pred.weight"].shape[0] / 3) ** 0.5),
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": max(layers) + 1,
        "decoder_intermediate_size": state[first].shape[0],
    }
    for key in ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size"):
        if key in given and given[key] != sizes[key]:
            raise UserError(f"decoder_config:{key}: {given[key]!r}, but {path} holds a decoder of {sizes[key]}")
    for key, only in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-12), ("qkv_bias", True), ("num_channels", 3)):
        if given.get(key, only) != only:
            raise UserError(f"decoder_config:{key}: {given[key]!r} is not supported, RAE's decoders have {only!r}")
    heads = given.get("decoder_num_attention_heads", _HEADS.get(width))
    if heads is None:
        raise UserError(
            f"decoder_config: the number of heads of a decoder of width {width} is needed; give its config folder"
        )
    return {**sizes, "decoder_num_attention_heads": heads}


def _options(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    options = config or {}
    if unknown := sorted(set(options) - {*_USED_KEYS, *_PATH_KEYS}):
        raise UserError(f"config: unknown key {unknown[0]!r} of RAE; known: {', '.join((*_USED_KEYS, *_PATH_KEYS))}")
    if options.get("eps", VARIANCE_EPSILON) != VARIANCE_EPSILON:
        raise UserError(f"config:eps: {options['eps']} is not supported, only {VARIANCE_EPSILON}")
    return options


def _encoder(
    source: str | os.PathLike[str] | VisionEncoder | None,
    sizes: Mapping[str, int],
    revision: str | None,
    options: Mapping[str, Any],
) -> VisionEncoder | None:
    patch = sizes["decoder_patch_size"]
    if options.get("decoder_patch_size", patch) != patch:
        raise UserError(
            f"config:decoder_patch_size: {options['decoder_patch_size']}, the decoder in the file has {patch}"
        )
    if source is None:
        return None
    if isinstance(source, VisionEncoder):
        encoder = source.reading(norm_affine=False)
    else:
        encoder = VisionEncoder.from_pretrained(
            source, revision=revision, grid_size=sizes["latent_size"], norm_affine=False
        )
    side = options.get("encoder_input_size", encoder.image_size)
    check_image_size(side, encoder.patch_size, "config:encoder_input_size")
    if side != encoder.image_size:
        raise UserError(
            f"config:encoder_input_size: {side} px gives {side // encoder.patch_size} tokens per side, the decoder in "
            f"the file has {sizes['latent_size']}"
        )
    return encoder


def _load_decoder(model: RepresentationAutoencoder, state: Mapping[str, torch.Tensor], path: Path) -> None:
    own = model.decoder.state_dict()
    if missing := sorted(own.keys() - state.keys()):
        raise UserError(f"{path}: {len(missing)} tensors of the decoder are missing, the first is {missing[0]}")
    if extra := sorted(state.keys() - own.keys()):
        raise UserError(f"{path}: {len(extra)} tensors belong to no RAE decoder, the first is {extra[0]}")
    for key, value in own.items():
        if state[key].shape != value.shape:
            given, needed = tuple(state[key].shape), tuple(value.shape)
            raise UserError(f"{path}:{key}: shape {given} does not fit the decoder, which needs {needed}")
    model.decoder.load_state_dict(state)


def _set_statistics(model: RepresentationAutoencoder, path: Path) -> None:
    values = read_checkpoint(path)
    if not {"mean", "var"} & set(values):
        raise UserError(f"{path}: holds neither 'mean' nor 'var'; it is no file of latent statistics")
    try:
        model.set_statistics(values.get("mean"), values.get("var"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _refuse_siglip(config: Mapping[str, Any], where: str) -> None:
    if config.get("encoder_type") == "siglip2":
        raise UserError(
            f"{where}:encoder_type: diffusers' AutoencoderRAE cannot build 'siglip2' with transformers 5 (it looks "
            "for '.vision_model'); convert the official decoder with convert_rae instead"
        )


def _encoder_of(source: Any) -> VisionEncoder:
    old = source.config
    family = {"dinov2": "dinov2_with_registers", "mae": "vit_mae"}.get(old.encoder_type)
    if family is None:
        raise UserError(f"encoder_type {old.encoder_type!r} of AutoencoderRAE is not supported")
    network = source.encoder
    spec = EncoderSpec(
        family=family,
        config=network.config.to_dict(),
        image_size=old.encoder_input_size,
        norm_affine=False,
        image_mean=source.encoder_mean.flatten().tolist(),
        image_std=source.encoder_std.flatten().tolist(),
    )
    encoder = VisionEncoder.from_config(spec)
    weights = {key: value.float() for key, value in network.state_dict().items()}
    # Its final norm has no affine part, and neither is ours used.
    _load_encoder(encoder.backbone.model, weights, optional=("layernorm.weight", "layernorm.bias"))
    return VisionEncoder(encoder.backbone, encoder.spec())


def _load_encoder(network: torch.nn.Module, weights: dict[str, torch.Tensor], optional: tuple[str, ...] = ()) -> None:
    own = network.state_dict()
    given = {key: value for key, value in weights.items() if key in own}
    if missing := sorted(own.keys() - given.keys() - set(optional)):
        raise UserError(f"encoder: {len(missing)} tensors are missing, the first is {missing[0]}")
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"encoder:{key}: shape {tuple(value.shape)} does not fit the other class, which needs "
                f"{tuple(own[key].shape)}"
            )
    network.load_state_dict(given, strict=False)


def _refuse_other_architecture(encoder: VisionEncoder, built: Mapping[str, Any]) -> None:
    """Refuse an encoder that the network AutoencoderRAE builds from four numbers would not reproduce."""
    for key in ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "qkv_bias", "mlp_ratio",
                "intermediate_size", "use_swiglu_ffn"):  # fmt: skip
        ours = encoder.backbone.architecture.get(key)
        if ours != built.get(key):
            raise UserError(
                f"to_diffusers: AutoencoderRAE cannot hold this encoder: it builds one with {key} "
                f"{built.get(key)}, not {ours}"
            )


def _diffusers_kind(model: RepresentationAutoencoder, encoder: VisionEncoder) -> str:
    kind = {"dinov2_with_registers": "dinov2", "vit_mae": "mae"}.get(encoder.family)
    problem = None
    if encoder.family == "siglip":
        problem = "its SigLIP2 branch is broken with transformers 5"
    elif kind is None:
        problem = f"it has no {encoder.family} encoder"
    elif (encoder.layers, encoder.combination) != ("last", "last"):
        problem = "it reads the last layer only"
    elif kind == "dinov2" and encoder.backbone.prefix_tokens != 5:
        problem = f"it drops 5 prefix tokens, this encoder has {encoder.backbone.prefix_tokens}"
    elif list(model.config.image_mean) != encoder.image_mean or list(model.config.image_std) != encoder.image_std:
        problem = "its decoder speaks the encoder's normalised pixels"
    if kind is None or problem:
        raise UserError(f"to_diffusers: AutoencoderRAE cannot hold this autoencoder: {problem}")
    return kind

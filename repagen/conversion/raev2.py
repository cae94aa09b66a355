"""Official RAEv2 autoencoders (arXiv 2605.18324) as `RepresentationAutoencoder`: encoder names, layers, statistics."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repagen.conversion.rae import assemble, check_eps, export_rae, read_decoder
from repagen.encoders import Combination, VisionEncoder
from repagen.encoders.images import IMAGENET_MEAN, IMAGENET_STD
from repagen.errors import UserError
from repagen.models.autoencoder_representation import RepresentationAutoencoder

_USED_KEYS = ("encoder_name", "resolution", "decoder_patch_size", "noise_tau", "eps")
_PATH_KEYS = ("decoder_config_path", "pretrained_decoder_path", "normalization_stat_path")
# Side in pixels of the image behind one token, whatever the encoder's own patch.
_PIXELS_PER_TOKEN = 16
# Families whose final norm loses its affine part; it stays in all others.
_STRIPPED = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit_mae")
# Families that see ImageNet-normalised pixels, whatever their own processor says.
_IMAGENET = (*_STRIPPED, "siglip", "webssl", "webssl_mae")

_DINOV2_IDS = {
    size: f"facebook/dinov2-with-registers-{name}"
    for size, name in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
}
_DINOV3_IDS = {
    size: f"facebook/dinov3-vit{size}-pretrain-lvd1689m"
    for size in ("s16", "s16plus", "b16", "l16", "h16plus", "7b16")
}
_SIGLIP2_IDS = {
    size: f"google/siglip2-{name}-patch16-256"
    for size, name in (("b", "base"), ("l", "large"), ("so400m", "so400m"), ("g", "giant-opt"))
}
_MAE_IDS = {size: f"facebook/vit-mae-{name}" for size, name in (("b", "base"), ("l", "large"), ("h", "huge"))}


@dataclass(frozen=True)
class _EncoderKind:
    """An official encoder class.

    Attributes:
        ids: size => Hub id of the same weights; empty where no Hub repository holds them for transformers.
        combination: how its layers become one.
        layers: size => layers where the name gives none; empty for a class that reads the last one.
        strips_affine: the final norm loses its affine part whatever the family.
    """

    ids: Mapping[str, str] = field(default_factory=dict)
    combination: Combination = "last"
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    strips_affine: bool = False


_TWELVE, _TWENTY_FOUR = (2, 5, 8, 11), (5, 11, 17, 23)
_KINDS = {
    "dinov2": _EncoderKind(_DINOV2_IDS),
    "dinov2mls": _EncoderKind(
        _DINOV2_IDS, "mean", {"s": _TWELVE, "b": _TWELVE, "l": _TWENTY_FOUR, "g": (10, 20, 30, 39)}
    ),
    "dinov3": _EncoderKind(_DINOV3_IDS),
    "dinov3mls": _EncoderKind(
        _DINOV3_IDS,
        "mean_plus_spatial_mean",
        {"s16": _TWELVE, "b16": _TWELVE, "l16": _TWENTY_FOUR, "h16plus": (8, 16, 24, 31)},
    ),
    "siglip2": _EncoderKind(_SIGLIP2_IDS),
    "siglip2mls": _EncoderKind(
        _SIGLIP2_IDS,
        "mean_plus_spatial_mean",
        {"b": _TWELVE, "l": _TWENTY_FOUR, "so400m": (5, 12, 19, 26), "g": (10, 20, 30, 39)},
    ),
    "mae": _EncoderKind(_MAE_IDS),
    "eupemls": _EncoderKind({}, "sum", {"t16": _TWELVE, "s16": _TWELVE, "b16": _TWELVE}, strips_affine=True),
}
_NAME = re.compile(r"(?P<kind>[a-z0-9]+)-(?P<network>[a-z]+)-(?P<size>[a-z0-9]+?)(?P<suffix>(?:norm|woreg)*)"
                   r"(?:\[(?P<flags>[^\]]*)\])?")  # fmt: skip


@dataclass(frozen=True)
class OfficialEncoderName:
    """What an official name such as `dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]` says.

    Attributes:
        name: the name.
        hub_id: repository with the weights, or None where there is none.
        layers: 0-based blocks, or "last".
        combination: how they become one.
        norm_affine: whether the final norm keeps its affine part; None: as its family.
    """

    name: str
    hub_id: str | None
    layers: str | list[int]
    combination: Combination
    norm_affine: bool | None

    @classmethod
    def parse(cls, name: str) -> OfficialEncoderName:
        """Read an official name.

        Raises:
            UserError: an unknown class, size or flag, or layers that are no ascending block numbers.
        """
        match = _NAME.fullmatch(name)
        if match is None or match["kind"] not in _KINDS:
            raise UserError(
                f"encoder name {name!r} is none of RAEv2's that are supported: "
                f"{', '.join(_KINDS)}, as in 'dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]'"
            )
        kind, size = _KINDS[match["kind"]], match["size"]
        flags = [flag.strip() for flag in (match["flags"] or "").split(",") if flag.strip()]
        flags += re.findall("norm|woreg", match["suffix"])
        sizes = kind.ids or kind.layers
        if size not in sizes:
            raise UserError(f"encoder name {name!r}: size {size!r} is none of {', '.join(sizes)}")
        layers = next((flag.removeprefix("layers=") for flag in flags if flag.startswith("layers=")), None)
        allowed = {"norm", "woreg"} if match["kind"].startswith("dinov2") else {"norm"}
        others = [flag for flag in flags if not flag.startswith("layers=")]
        if unknown := [flag for flag in others if flag not in allowed or not match["kind"].startswith("dino")]:
            raise UserError(f"encoder name {name!r}: unknown flag {unknown[0]!r}")
        hub_id = kind.ids.get(size)
        if hub_id is not None and "woreg" in others:
            hub_id = hub_id.replace("-with-registers", "")
        affine = True if "norm" in others else False if kind.strips_affine else None
        return cls(name, hub_id, _layers(name, kind, size, layers), kind.combination, affine)


def convert_raev2(
    decoder_path: str | Path,
    *,
    encoder: str | os.PathLike[str] | VisionEncoder | None,
    decoder_config: str | Path | Mapping[str, Any] | None = None,
    statistics: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> RepresentationAutoencoder:
    """Read an official RAEv2 autoencoder. Its decoder's output is [0, 1] as it is.

    The encoder is read as the official class does: the final norm on every selected layer, without its affine part
    for DINO and MAE and with it for all others; DINOv3 and SigLIP2 give the mean of the layers plus the mean over
    tokens of the last one, DINOv2 their mean, EUPE their sum; pixels are ImageNet-normalised, for SigLIP2 too. (The
    official code resizes images of another size to `resolution` first, and for DINOv2 to the network's side after
    that; here they are resized once.)

    Args:
        decoder_path: `.pt` or `.safetensors` with the decoder (`decoder.pt` of RAEv2-models), or a training file.
        encoder: an official name (`dinov3mls-vit-l16[layers=...]`), whose weights come from the Hub; or a folder, a
            Hub id or a `VisionEncoder`, read as `config`'s `encoder_name` says, and without that name in its last
            layer (a `VisionEncoder`: in the layers it has). None gives an autoencoder that only decodes.
        decoder_config: see `convert_rae`.
        statistics: file of the latents' `mean` and `var` (`stats.pt`), each (C, h, w) or None, and nothing else.
        config: official constructor arguments: `encoder_name`, `resolution`, `noise_tau` (0.8 by default); sizes are
            checked, paths ignored.

    Returns:
        A `RepresentationAutoencoder` in eval mode and float32.

    Raises:
        UserError: for a file that is missing or unreadable; tensors that are missing, left over, misshapen or not
            finite, by name; an unknown encoder name; an encoder that does not fit.
    """
    path = Path(decoder_path)
    options = dict(config or {})
    if unknown := sorted(set(options) - {*_USED_KEYS, *_PATH_KEYS}):
        raise UserError(
            f"config: raev2 has no argument {unknown[0]!r}; allowed are {', '.join((*_USED_KEYS, *_PATH_KEYS))}"
        )
    check_eps(options)
    source, sizes = read_decoder(path, decoder_config)
    for key, value in (
        ("decoder_patch_size", sizes["decoder_patch_size"]),
        ("resolution", sizes["latent_size"] * _PIXELS_PER_TOKEN),
    ):
        if options.get(key, value) != value:
            raise UserError(f"config:{key}: {options[key]}, the decoder in the file is for {value}")
    loaded = _encoder(encoder, options.get("encoder_name"), sizes["latent_size"])
    return assemble(
        source, sizes, loaded, statistics, normalised_pixels=False, noise_tau=options.get("noise_tau", 0.8)
    )


def export_raev2(model: RepresentationAutoencoder, path: Path) -> None:
    """Write the decoder under official names, as `stage1/*/decoder.pt` are.

    Raises:
        UserError: another model, one whose decoder speaks normalised pixels, or a path that cannot be written.
    """
    if isinstance(model, RepresentationAutoencoder):
        pixels = (list(model.config.image_mean), list(model.config.image_std))
        if pixels != ([0.0] * 3, [1.0] * 3):
            raise UserError("family 'raev2' has decoders of plain pixels; this one's are normalised, as RAE's ('rae')")
    export_rae(model, path)


def _encoder(
    source: str | os.PathLike[str] | VisionEncoder | None, name: str | None, grid: int
) -> VisionEncoder | None:
    """Load an encoder and read it as the official class of its name or family does."""
    if source is None:
        return None
    if name is None and isinstance(source, str) and _is_official_name(source):
        name = source
    official = None if name is None else OfficialEncoderName.parse(name)
    if isinstance(source, str) and official is not None and source == name:
        if official.hub_id is None:
            raise UserError(
                f"encoder: no Hub repository is known for {name!r}; give its folder as encoder, and the name as "
                "config encoder_name"
            )
        source = official.hub_id
    if not isinstance(source, VisionEncoder):
        source = VisionEncoder.from_pretrained(source, grid_size=grid)
    reading: dict[str, Any] = {"norm_affine": source.family not in _STRIPPED}
    if official is not None:
        reading |= {"layers": official.layers, "combination": official.combination}
        if official.norm_affine is not None:
            reading["norm_affine"] = official.norm_affine
    if source.family in _IMAGENET:
        reading |= {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    return source.reading(**reading)


def _is_official_name(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match["kind"] in _KINDS and not Path(name).is_dir()


def _layers(name: str, kind: _EncoderKind, size: str, given: str | None) -> str | list[int]:
    if not kind.layers:
        if given is not None:
            raise UserError(f"encoder name {name!r}: this class reads the last layer; layers belong to '...mls'")
        return "last"
    if given is None:
        if size not in kind.layers:
            raise UserError(f"encoder name {name!r}: say which layers, as in [layers=2.5.8.11]")
        return list(kind.layers[size])
    numbers = given.split(".")
    layers = [int(number) for number in numbers if number.isdecimal()]
    if len(layers) != len(numbers) or layers != sorted(set(layers)):
        raise UserError(f"encoder name {name!r}: layers must be ascending block numbers, as in [layers=2.5.8.11]")
    return layers

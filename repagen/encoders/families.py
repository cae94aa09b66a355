"""The table of encoder families: everything repagen knows about an encoder that its own files do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from repagen.encoders.images import IMAGENET_MEAN, IMAGENET_STD
from repagen.errors import UserError

if TYPE_CHECKING:
    from repagen.hub.card import LicenceFact

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
UNCHANGED_MEAN, UNCHANGED_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class TransformersFamily:
    """One kind of network of transformers, and how one of its checkpoints is opened.

    Attributes:
        name: the family's name in configs.
        model_types: values of `model_type` in a `config.json` that belong to it.
        model_class: the class that is built, by name (transformers; empty for timm).
        config_class: the class of its configuration.
        default_id: the usual checkpoint.
        licence: licence of the published weights.
        redistributable: whether that licence lets a saved model carry the weights.
        gated: whether the Hub asks for an accepted licence.
        fixed_config: entries of the model's config that must have these values to read features.
        old_keys: keys of older configs that transformers turns into others.
        tower_prefix: how the names of its tensors begin in a checkpoint with a second tower, where transformers does
            not see to that itself; a regular expression.
        constructor: keyword arguments of the model class.
        arguments: keyword arguments of every forward pass.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    config_class: str
    default_id: str
    licence: str
    redistributable: bool
    gated: bool = False
    fixed_config: dict[str, Any] = field(default_factory=dict)
    old_keys: tuple[str, ...] = ()
    tower_prefix: str | None = None
    constructor: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EncoderFamily(TransformersFamily):
    """One kind of vision transformer and how its patch tokens are read.

    Attributes:
        cls_tokens: number of class tokens in front of the patch tokens, or the key of the model's own config that
            counts them.
        final_norm: path of the module that is the last norm; empty where the network has none. A network may be
            configured without it (BEiT with mean pooling).
        name_prefix: how the names of its checkpoints begin, where another family has the same `model_type`.
        register_key: key of the model's own config that counts its register tokens, if it has any.
        normalises_patches: whether the model itself applies that norm to patch tokens (CLIP: to the class token only).
        default_side: input side when none is asked for: `grid16` gives 16 x 16 tokens (224 px at patch 14, 256 px at
            patch 16) to any model made for at least 14 x 14, `native` the side of the model's config.
        side_key: key of the model's own config that holds its input side in pixels.
        any_side: whether the network takes other sides than that; a key of its config where that says so.
        any_grid: whether it takes any grid of tokens, images that are not square among them, without being rebuilt.
        frames_key: (video) key of the model's own config that counts the frames of one token; an image is repeated.
        patch_order: keyword argument that takes the order of the patches, where the model shuffles them without it.
        image_mean, image_std: normalisation where the checkpoint has no `preprocessor_config.json`.
    """

    cls_tokens: int | str
    final_norm: str
    name_prefix: str = ""
    register_key: str | None = None
    normalises_patches: bool = True
    default_side: Literal["grid16", "native"] = "grid16"
    side_key: str = "image_size"
    any_side: bool | str = True
    any_grid: bool = True
    frames_key: str | None = None
    patch_order: str | None = None
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    def takes_side(self, config: Mapping[str, Any]) -> bool:
        """Whether a network of a config takes other sides than its own."""
        return self.any_side if isinstance(self.any_side, bool) else bool(config.get(self.any_side))

    def require_grid(self, config: Mapping[str, Any], grid: tuple[int, int], own: int) -> None:
        """Refuse a grid of tokens that a network does not take.

        Args:
            config: of the network.
            grid: rows and columns.
            own: rows and columns of the square that it was opened for.

        Raises:
            UserError: it has positions for that square alone.
        """
        if grid != (own, own) and not (self.any_grid and self.takes_side(config)):
            raise UserError(
                f"encoder: images of {grid[0]}x{grid[1]} tokens, but this {self.name} has positions for the "
                f"{own}x{own} that it was opened for alone; take squares of that size, or an encoder of another family"
            )


_INTERPOLATED = {"interpolate_pos_encoding": True}
_NON_COMMERCIAL = "CC-BY-NC-4.0 (non-commercial)"

_ROWS = (
    EncoderFamily(
        name="dinov2",
        model_types=("dinov2",),
        model_class="Dinov2Model",
        config_class="Dinov2Config",
        cls_tokens=1,
        final_norm="layernorm",
        default_id="facebook/dinov2-base",
        licence="Apache-2.0",
        redistributable=True,
    ),
    EncoderFamily(
        name="dinov2_with_registers",
        model_types=("dinov2_with_registers",),
        model_class="Dinov2WithRegistersModel",
        config_class="Dinov2WithRegistersConfig",
        cls_tokens=1,
        register_key="num_register_tokens",
        final_norm="layernorm",
        default_id="facebook/dinov2-with-registers-base",
        licence="Apache-2.0",
        redistributable=True,
    ),
    EncoderFamily(
        name="dinov3_vit",
        model_types=("dinov3_vit",),
        model_class="DINOv3ViTModel",
        config_class="DINOv3ViTConfig",
        cls_tokens=1,
        register_key="num_register_tokens",
        final_norm="norm",
        default_id="facebook/dinov3-vitb16-pretrain-lvd1689m",
        licence="DINOv3 License (gated)",
        redistributable=False,
        gated=True,
    ),
    EncoderFamily(
        # The fixed-size SigLIP2 checkpoints (google/siglip2-base-patch16-256 ...) are of this model type too.
        name="siglip",
        model_types=("siglip", "siglip_vision_model"),
        model_class="SiglipVisionModel",
        config_class="SiglipVisionConfig",
        cls_tokens=0,
        final_norm="post_layernorm",
        default_side="native",
        arguments=_INTERPOLATED,
        default_id="google/siglip2-base-patch16-256",
        licence="Apache-2.0",
        redistributable=True,
        image_mean=HALF,
        image_std=HALF,
    ),
    EncoderFamily(
        name="clip",
        model_types=("clip", "clip_vision_model"),
        model_class="CLIPVisionModel",
        config_class="CLIPVisionConfig",
        cls_tokens=1,
        final_norm="post_layernorm",
        normalises_patches=False,
        default_side="native",
        arguments=_INTERPOLATED,
        default_id="openai/clip-vit-large-patch14",
        licence="MIT",
        redistributable=True,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    ),
    EncoderFamily(
        name="vit_mae",
        model_types=("vit_mae",),
        model_class="ViTMAEModel",
        config_class="ViTMAEConfig",
        cls_tokens=1,
        final_norm="layernorm",
        patch_order="noise",
        fixed_config={"mask_ratio": 0.0},
        arguments=_INTERPOLATED,
        default_id="facebook/vit-mae-base",
        licence=_NON_COMMERCIAL,
        redistributable=False,
    ),
    EncoderFamily(
        name="ijepa",
        model_types=("ijepa",),
        model_class="IJepaModel",
        config_class="IJepaConfig",
        cls_tokens=0,
        final_norm="layernorm",
        arguments=_INTERPOLATED,
        default_id="facebook/ijepa_vith14_1k",
        licence=_NON_COMMERCIAL,
        redistributable=False,
    ),
    EncoderFamily(
        # DINO (2104.14294), and any other vision transformer of this class; its pooler is not read.
        name="vit",
        model_types=("vit",),
        model_class="ViTModel",
        config_class="ViTConfig",
        cls_tokens=1,
        final_norm="layernorm",
        constructor={"add_pooling_layer": False},
        arguments=_INTERPOLATED,
        default_id="facebook/dino-vitb16",
        licence="Apache-2.0",
        redistributable=True,
    ),
    EncoderFamily(
        # Web-DINO (2504.01017): DINOv2's network under another licence.
        name="webssl",
        model_types=("dinov2",),
        name_prefix="webssl-",
        model_class="Dinov2Model",
        config_class="Dinov2Config",
        cls_tokens=1,
        final_norm="layernorm",
        default_id="facebook/webssl-dino1b-full2b-224",
        licence=_NON_COMMERCIAL,
        redistributable=False,
    ),
    EncoderFamily(
        # Web-MAE (2504.01017): encoders only, without masking.
        name="webssl_mae",
        model_types=("vit",),
        name_prefix="webssl-",
        model_class="ViTModel",
        config_class="ViTConfig",
        cls_tokens=1,
        final_norm="layernorm",
        constructor={"add_pooling_layer": False},
        arguments=_INTERPOLATED,
        default_id="facebook/webssl-mae1b-full2b-224",
        licence=_NON_COMMERCIAL,
        redistributable=False,
    ),
    EncoderFamily(
        # MetaCLIP (2309.16671): CLIP's network under another licence.
        name="metaclip",
        model_types=("clip", "clip_vision_model"),
        name_prefix="metaclip-",
        model_class="CLIPVisionModel",
        config_class="CLIPVisionConfig",
        cls_tokens=1,
        final_norm="post_layernorm",
        normalises_patches=False,
        default_side="native",
        arguments=_INTERPOLATED,
        default_id="facebook/metaclip-l14-fullcc2.5b",
        licence=_NON_COMMERCIAL,
        redistributable=False,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    ),
    EncoderFamily(
        # MetaCLIP 2 (2507.22062).
        name="metaclip_2",
        model_types=("metaclip_2", "metaclip_2_vision_model"),
        model_class="MetaClip2VisionModel",
        config_class="MetaClip2VisionConfig",
        cls_tokens=1,
        final_norm="post_layernorm",
        normalises_patches=False,
        default_side="native",
        arguments=_INTERPOLATED,
        default_id="facebook/metaclip-2-worldwide-huge-quickgelu",
        licence=_NON_COMMERCIAL,
        redistributable=False,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    ),
    EncoderFamily(
        # data2vec (2202.03555).
        name="data2vec_vision",
        model_types=("data2vec-vision",),
        model_class="Data2VecVisionModel",
        config_class="Data2VecVisionConfig",
        cls_tokens=1,
        final_norm="layernorm",
        arguments=_INTERPOLATED,
        default_id="facebook/data2vec-vision-base",
        licence="Apache-2.0",
        redistributable=True,
        image_mean=HALF,
        image_std=HALF,
    ),
    EncoderFamily(
        # BEiT (2106.08254).
        name="beit",
        model_types=("beit",),
        model_class="BeitModel",
        config_class="BeitConfig",
        cls_tokens=1,
        final_norm="layernorm",
        constructor={"add_pooling_layer": False},
        arguments=_INTERPOLATED,
        default_id="microsoft/beit-base-patch16-224-pt22k",
        licence="Apache-2.0",
        redistributable=True,
        image_mean=HALF,
        image_std=HALF,
    ),
    EncoderFamily(
        # AIMv2 (2411.14402). Its last norm is an RMSNorm; only the native-resolution checkpoints take other sides.
        name="aimv2",
        model_types=("aimv2", "aimv2_vision_model"),
        model_class="Aimv2VisionModel",
        config_class="Aimv2VisionConfig",
        cls_tokens=0,
        final_norm="rms_norm",
        default_side="native",
        any_side="is_native",
        tower_prefix=r"vision_model\.",
        fixed_config={"use_head": False},
        default_id="apple/aimv2-large-patch14-224-lit",
        licence="Apple model licence",
        redistributable=False,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    ),
    EncoderFamily(
        # V-JEPA 2 (2506.09985): one step of time, made of an image repeated; the predictor is left out.
        name="vjepa2",
        model_types=("vjepa2",),
        model_class="VJEPA2Model",
        config_class="VJEPA2Config",
        cls_tokens=0,
        final_norm="encoder.layernorm",
        side_key="crop_size",
        any_grid=False,  # transformers counts the rows by the side in the config
        frames_key="tubelet_size",
        fixed_config={"pred_num_hidden_layers": 0},
        arguments={"skip_predictor": True},
        default_id="facebook/vjepa2-vitl-fpc64-256",
        licence="MIT or Apache-2.0, by checkpoint",
        redistributable=True,
    ),
    EncoderFamily(
        # C-RADIO (2412.07679): normalises pixels by itself, has no final norm, and a class token per teacher.
        name="radio",
        model_types=("radio",),
        model_class="RadioModel",
        config_class="RadioConfig",
        cls_tokens="num_cls_tokens",
        register_key="num_registers",
        final_norm="",
        default_id="nvidia/C-RADIOv4-H",
        licence="NVIDIA Open Model License",
        redistributable=False,
        image_mean=UNCHANGED_MEAN,
        image_std=UNCHANGED_STD,
    ),
    EncoderFamily(
        # Pixio (2512.15715): eight class tokens, averaged as its authors recommend.
        name="pixio",
        model_types=("pixio",),
        model_class="PixioModel",
        config_class="PixioConfig",
        cls_tokens="n_cls_tokens",
        final_norm="layernorm",
        default_id="facebook/pixio-vitb16",
        licence="FAIR Noncommercial Research License (gated)",
        redistributable=False,
        gated=True,
    ),
    EncoderFamily(
        # TIPSv2: trained on pixels in [0, 1]; its register token is a second class token.
        name="tipsv2",
        model_types=("tipsv2", "tipsv2_vision_model"),
        model_class="Tipsv2VisionModel",
        config_class="Tipsv2VisionConfig",
        cls_tokens=1,
        register_key="num_register_tokens",
        final_norm="layernorm",
        default_id="google/tipsv2-b14",
        licence="Apache-2.0",
        redistributable=True,
        image_mean=UNCHANGED_MEAN,
        image_std=UNCHANGED_STD,
    ),
    EncoderFamily(
        # Any vision transformer of timm, Perception Encoder among them; counts and norms are attributes of its model.
        name="timm",
        model_types=(),
        model_class="",
        config_class="",
        cls_tokens=1,
        final_norm="norm",
        default_side="native",
        any_grid=False,  # its tables of positions are resampled once, when it is opened
        default_id="timm:vit_pe_core_base_patch16_224.fb",
        licence="see the model card",
        redistributable=False,
    ),
)

FAMILIES: dict[str, EncoderFamily] = {row.name: row for row in _ROWS}


def family_of(model_type: Any, name: str) -> EncoderFamily:
    """Return the family of a checkpoint.

    Args:
        model_type: entry of its `config.json`.
        name: its folder or Hub id; tells apart families that share a model type.

    Raises:
        UserError: for a type repagen does not know, naming the file it stands in.
    """
    where = f"{name}:config.json"
    if model_type == "siglip2":
        raise UserError(
            f"{where}: model_type 'siglip2' is a NaFlex checkpoint (variable token grid), which is not supported; "
            "use a fixed-size SigLIP2 such as google/siglip2-base-patch16-256"
        )
    rows = [row for row in _ROWS if model_type in row.model_types]
    if not rows:
        known = sorted({model_type for row in _ROWS for model_type in row.model_types})
        raise UserError(
            f"{where}: model_type {model_type!r} is no supported vision encoder; supported: {', '.join(known)}, or a "
            "timm vision transformer as 'timm:NAME'"
        )
    return max(
        (row for row in rows if PurePosixPath(name).name.startswith(row.name_prefix)),
        key=lambda row: len(row.name_prefix),
    )


def licence_fact(
    family: TransformersFamily, name: str | None, revision: str | None, stored: bool, part: str = "encoder"
) -> LicenceFact:
    """Return the licence of an encoder that a model is made with, and what follows from it.

    Args:
        family: its row of a table.
        name: Hub id or folder of its weights; None: they come from nowhere.
        revision: commit of that Hub repository.
        stored: whether the model carries the weights.
        part: what the encoder is to the model.
    """
    from repagen.hub.card import LicenceFact, without_local_paths

    licence, consequences = family.licence, []
    if revision is None:  # from a folder, or not from anywhere: anybody's weights
        licence = f"unknown ({licence} for the published weights of {family.name})"
    if "commercial" in licence.lower():
        consequences.append("the model is made of its features: no commercial use without leave of its authors")
    if family.gated:
        consequences.append("its weights are handed out by its authors alone, who ask for an agreement")
    if stored and not family.redistributable:
        consequences.append("its weights are inside, though this licence may not let them be passed on")
    return LicenceFact(
        part=part,
        name=without_local_paths(name or f"{family.name}, its weights inside"),
        licence=licence,
        consequence="; ".join(consequences),
    )

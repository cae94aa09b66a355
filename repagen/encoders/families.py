"""The table of encoder families: everything repagen knows about an encoder that its own files do not say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from repagen.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class EncoderFamily:
    """One kind of vision transformer and how its patch tokens are read.

    Attributes:
        name: the family's name in configs.
        model_types: values of `model_type` in a `config.json` that belong to it.
        model_class: the class that is built, by name (transformers; empty for timm).
        config_class: the class of its configuration.
        cls_tokens: number of class tokens in front of the patch tokens.
        register_key: key of the model's own config that counts its register tokens, if it has any.
        final_norm: attribute of the model that holds the last LayerNorm.
        normalises_patches: whether the model itself applies that norm to patch tokens (CLIP: to the class token only).
        default_side: input side when none is asked for: `grid16` gives 16 x 16 tokens (224 px at patch 14, 256 px at
            patch 16) to any model made for at least 14 x 14, `native` the side of the model's config.
        arguments: keyword arguments of every forward pass.
        default_id: the usual checkpoint.
        licence: licence of the published weights.
        redistributable: whether that licence lets a saved autoencoder carry the weights.
        gated: whether the Hub asks for an accepted licence.
        image_mean, image_std: normalisation where the checkpoint has no `preprocessor_config.json`.
    """

    name: str
    model_types: tuple[str, ...]
    model_class: str
    config_class: str
    cls_tokens: int
    final_norm: str
    default_id: str
    licence: str
    redistributable: bool
    register_key: str | None = None
    normalises_patches: bool = True
    default_side: Literal["grid16", "native"] = "grid16"
    arguments: dict[str, Any] = field(default_factory=dict)
    gated: bool = False
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD


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
        arguments={"interpolate_pos_encoding": True},
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
        arguments={"interpolate_pos_encoding": True},
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
        arguments={"interpolate_pos_encoding": True},
        default_id="facebook/vit-mae-base",
        licence="CC-BY-NC-4.0 (non-commercial)",
        redistributable=False,
    ),
    EncoderFamily(
        name="ijepa",
        model_types=("ijepa",),
        model_class="IJepaModel",
        config_class="IJepaConfig",
        cls_tokens=0,
        final_norm="layernorm",
        arguments={"interpolate_pos_encoding": True},
        default_id="facebook/ijepa_vith14_1k",
        licence="CC-BY-NC-4.0 (non-commercial)",
        redistributable=False,
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
        default_id="timm:vit_pe_core_base_patch16_224.fb",
        licence="see the model card",
        redistributable=False,
    ),
)

FAMILIES: dict[str, EncoderFamily] = {row.name: row for row in _ROWS}
_BY_MODEL_TYPE = {model_type: row for row in _ROWS for model_type in row.model_types}


def family_of(model_type: Any, where: str) -> EncoderFamily:
    """Return the family of a `model_type`.

    Raises:
        UserError: for a type repagen does not know, naming the file it stands in.
    """
    if model_type == "siglip2":
        raise UserError(
            f"{where}: model_type 'siglip2' is a NaFlex checkpoint (variable token grid), which is not supported; "
            "use a fixed-size SigLIP2 such as google/siglip2-base-patch16-256"
        )
    if not isinstance(model_type, str) or model_type not in _BY_MODEL_TYPE:
        raise UserError(
            f"{where}: model_type {model_type!r} is no supported vision encoder; supported: "
            f"{', '.join(sorted(_BY_MODEL_TYPE))}, or a timm vision transformer as 'timm:NAME'"
        )
    return _BY_MODEL_TYPE[model_type]

"""Vision encoders as feature extractors: our adapters, CLIP's projected embeddings, any pooled model of timm.

Weights come from a folder or the Hub's cache, never over the network: what figures rest on is fetched knowingly.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from repagen.encoders.files import local_weights
from repagen.encoders.weights import load_pretrained, refuse_not_finite, weights_sha256
from repagen.errors import UserError, refusing
from repagen.evaluation.extractor import ExtractorIdentity, ExtractorRule, FeatureExtractor, Pooling, require_square
from repagen.evaluation.inception import INCEPTION, InceptionExtractor
from repagen.evaluation.resize import ResizeKernel, resize

if TYPE_CHECKING:
    from repagen.encoders import VisionEncoder

Precision = Literal["float32", "bfloat16"]
FEATURE = "features"  # the one feature of an encoder


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


class EncoderExtractor:
    """Any vision encoder as extractor: the mean of its patch tokens, or its class token.

    Args:
        encoder: a frozen `VisionEncoder`; it normalises the pixels.
        pooling: `mean` exists for every encoder; `cls` is what FD-DINOv2 is published with (2306.04675).
        kernel: how images get to the encoder's side.
        precision: `bfloat16` runs the encoder under autocast.

    Raises:
        UserError: with the first images, when they are not square, or the encoder has no class token to pool; for
            attention pooling, which encoders of this kind have not.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        pooling: Pooling = "mean",
        *,
        kernel: ResizeKernel = "torch-bicubic-antialias",
        precision: Precision = "float32",
    ) -> None:
        if pooling == "attention":
            raise UserError("pooling=attention is for extractors of kind timm; use mean or cls")
        self.encoder = encoder
        self.pooling = pooling
        self.kernel = kernel
        self.precision = precision
        self.dimensions: Mapping[str, int] = {FEATURE: encoder.hidden_size}
        reading = f"layers={encoder.layers}, combination={encoder.combination}, norm_affine={encoder.norm_affine}"
        dtype = precision if precision != "float32" else str(encoder.dtype).removeprefix("torch.")
        self.identity = ExtractorIdentity(
            name=encoder.name_or_path or f"{encoder.family} with random weights",
            weights_sha256=encoder.fingerprint(),
            settings=f"port=repagen, pooling={pooling}, size={encoder.image_size}, kernel={kernel}, {reading}, "
            f"dtype={dtype}",
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of uint8 images (B, 3, H, W)."""
        require_square(images)
        device = self.encoder.device
        pixels = resize(images.to(device), self.encoder.image_size, self.kernel) / 255
        with _autocast(device, self.precision):
            output = self.encoder(pixels)
        if self.pooling == "mean":
            return {FEATURE: output.tokens.float().mean(dim=1)}
        if output.cls is None:
            raise UserError(f"encoder {self.identity.name} has no class token; use pooling mean")
        return {FEATURE: output.cls.float()}


class PooledExtractor:
    """A network that maps normalised pixels to one vector an image.

    Args:
        network: pixels (B, 3, size, size) => features (B, D), frozen.
        identity: who the network is.
        dimension: D.
        side: of its input, in pixels.
        mean, std: normalisation of pixels in [0, 1].
        kernel, precision: as in `ExtractorRule`.
    """

    def __init__(
        self,
        network: nn.Module,
        identity: ExtractorIdentity,
        dimension: int,
        *,
        side: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        kernel: ResizeKernel,
        precision: Precision,
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.identity = identity
        self.dimensions: Mapping[str, int] = {FEATURE: dimension}
        self.side = side
        self.kernel = kernel
        self.precision = precision
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the features of uint8 images (B, 3, H, W).

        Raises:
            UserError: for images that are not square.
        """
        require_square(images)
        device = next(self.network.parameters()).device
        pixels = resize(images.to(device), self.side, self.kernel) / 255
        pixels = (pixels - self.mean.to(device)) / self.std.to(device)
        with _autocast(device, self.precision):
            return {FEATURE: self.network(pixels).float()}


class _ClipEmbedding(nn.Module):
    """Projected CLIP image embeddings of length 1."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model(pixel_values=pixels).image_embeds.float(), dim=1)


def clip_extractor(rule: ExtractorRule, device: torch.device | str) -> PooledExtractor:
    """Open the vision tower of a CLIP model with its projection (CMMD, 2401.09603).

    Raises:
        UserError: where the model is not at hand, or is no CLIP model.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    weights = local_weights(rule.model)
    with refusing(f"extractor {rule.model}: not a CLIP model; give a folder, or a Hub id that is in the cache"):
        model: Any = load_pretrained(CLIPVisionModelWithProjection, weights, rule.model)
        processor = CLIPImageProcessor.from_pretrained(weights.parent, local_files_only=True)
    refuse_not_finite(model, weights, rule.model)
    side = rule.size_px or model.config.image_size
    if side != model.config.image_size:
        raise UserError(f"extractor {rule.model}: takes {model.config.image_size} px, the protocol asks for {side}")
    return PooledExtractor(
        _ClipEmbedding(model).to(device),
        _identity(rule, model, side, "projection"),
        model.config.projection_dim,
        side=side,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        kernel=rule.kernel,
        precision=rule.precision,
    )


class _TimmPooling(nn.Module):
    """The features of a timm model, pooled."""

    def __init__(self, model: Any, pooling: Pooling) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.model.forward_features(pixels)
        if self.pooling == "attention":
            return self.model.forward_head(features, pre_logits=True)
        if features.ndim == 4:  # a convolutional network
            return features.mean(dim=(2, 3))
        return features[:, 0] if self.pooling == "cls" else features[:, self.model.num_prefix_tokens :].mean(dim=1)


def timm_extractor(rule: ExtractorRule, device: torch.device | str) -> PooledExtractor:
    """Open any model of timm: a folder or Hub id in timm's layout, or by its timm name; the latter two from the cache.

    Raises:
        UserError: where there is no such model, or its weights are not at hand.
    """
    import timm

    name, source = _timm_source(rule.model)
    with refusing(f"extractor {rule.model}: timm cannot open it; give a folder, or a timm name that is in the cache"):
        with torch.device("meta"):
            resizable = hasattr(timm.create_model(name, pretrained=False), "dynamic_img_size")
        # A transformer of another side resamples its positions and pads the image to whole patches, as in FD-Loss.
        sized: dict[str, Any] = dict.fromkeys(("dynamic_img_size", "dynamic_img_pad"), True)
        model: Any = timm.create_model(
            name, pretrained=True, num_classes=0, **source, **(sized if rule.size_px and resizable else {})
        )
    if rule.pooling == "cls" and not getattr(model, "num_prefix_tokens", 0):
        raise UserError(f"extractor {rule.model}: has no class token; use pooling mean or attention")
    config = model.pretrained_cfg
    side = rule.size_px or config["input_size"][-1]
    return PooledExtractor(
        _TimmPooling(model, rule.pooling).to(device),
        _identity(rule, model, side, f"port=timm, pooling={rule.pooling}"),
        model.num_features,
        side=side,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        kernel=rule.kernel,
        precision=rule.precision,
    )


def _timm_source(model: str) -> tuple[str, dict[str, Any]]:
    """The name to create a model by, and what else it takes so that timm looks for no weights by itself."""
    if "/" in model or Path(model).is_dir():
        return f"local-dir:{local_weights(model).parent}", {}
    # Elsewhere some weights are in a format of their own; what the Hub has is in timm's.
    return model, {"pretrained_cfg_overlay": {"file": str(local_weights(f"timm:{model}")), "custom_load": False}}


def _identity(rule: ExtractorRule, model: nn.Module, side: int, reading: str) -> ExtractorIdentity:
    settings = f"{reading}, size={side}, kernel={rule.kernel}, dtype={rule.precision}"
    return ExtractorIdentity(Path(rule.model).name, weights_sha256(model), settings)


def open_extractor(
    rule: ExtractorRule, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Open the extractor that a rule describes.

    Args:
        rule: what to open and how to read it.
        weights: file with Inception's weights; see `InceptionExtractor`.
        device: where to compute.

    Raises:
        UserError: when something is missing, or `weights` is given for another extractor than Inception.
    """
    if rule.kind == "inception":
        return InceptionExtractor(weights, device, rule.kernel)
    if weights is not None:
        raise UserError(f"extractor weights are given apart only for {INCEPTION}; {rule.model} brings its own")
    if rule.kind == "clip":
        return clip_extractor(rule, device)
    if rule.kind == "timm":
        return timm_extractor(rule, device)
    from repagen.encoders import VisionEncoder

    encoder = VisionEncoder.from_pretrained(rule.model, image_size=rule.size_px, local_files_only=True).to(device)
    return EncoderExtractor(encoder, rule.pooling, kernel=rule.kernel, precision=rule.precision)

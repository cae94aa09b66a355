"""The adversarial part of an autoencoder's loss: two discriminators behind one class, their losses and weights.

`dino` is RAE's (arXiv 2510.11690, stage 1): StyleGAN-T's heads (arXiv 2301.09515) on frozen DINO features, which sees
8-bit fakes through DiffAugment (arXiv 2006.10738). `patch` is the PatchGAN of VQGAN, LDM and SVG
(`patch_discriminator.py`). The adaptive weight is VQGAN's (arXiv 2012.09841, eq. 7).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from repagen.config import require
from repagen.encoders.backbones import transformers_config
from repagen.encoders.files import find_encoder, vision_family
from repagen.encoders.weights import load_pretrained
from repagen.errors import UserError
from repagen.training.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from transformers import ViTModel

DEFAULT_BACKBONE = "facebook/dino-vits8"  # DINO v1 ViT-S/8, Apache-2.0
DEFAULT_BLOCKS = (2, 5, 8, 11)

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_TRANSLATION = 0.125  # of the image side


@dataclass
class AdversarialConfig:
    """The adversarial part of an autoencoder's loss.

    Attributes:
        weight: of the adversarial loss, times the adaptive weight; RAE 0.75; 0 = without a discriminator.
        adaptive: balance the gradients of both losses at the decoder's last weight; without, the factor is 1.
        adaptive_epsilon, adaptive_maximum: of the adaptive weight |g_rec| / (|g_adv| + epsilon), clamped to the
            maximum. Here losses are means over pixel values; code that sums them has a maximum larger by their number.
        discriminator: `dino` (RAE) or `patch` (PatchGAN).
        discriminator_start_epoch: epochs of the dataset before the discriminator learns; RAE 6.
        discriminator_start_step: the same in optimiser steps; takes the place of the epochs.
        start_epoch: epochs before the decoder sees the adversarial loss; RAE 8.
        start_step: the same in optimiser steps; takes the place of the epochs.
        backbone: of `dino`, local folder or Hub id of the frozen ViT.
        blocks: of `dino`, 0-based blocks that the heads read, besides the last one.
        kernel_size: of `dino`, width of the heads' convolution over tokens; odd.
        patch_width, patch_layers: of `patch`, channels after the first convolution, and convolutions of stride 2.
        norm_samples: of `patch`, how many consecutive samples share the statistics of its batch norm; every
            micro-batch holds a multiple of them, so that the loss does not depend on the split.
        optimizer: of the discriminator; its schedule counts the run's steps, as the decoder's does.
    """

    weight: float = 0.75
    adaptive: bool = True
    adaptive_epsilon: float = 1e-6
    adaptive_maximum: float = 1e4
    discriminator: Literal["dino", "patch"] = "dino"
    discriminator_start_epoch: float = 6.0
    discriminator_start_step: int | None = None
    start_epoch: float = 8.0
    start_step: int | None = None
    backbone: str = DEFAULT_BACKBONE
    blocks: list[int] = field(default_factory=lambda: list(DEFAULT_BLOCKS))
    kernel_size: int = 9
    patch_width: int = 64
    patch_layers: int = 3
    norm_samples: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def validate(self) -> None:
        """Check the ranges."""
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        for name in ("discriminator_start_epoch", "discriminator_start_step", "start_epoch", "start_step"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "at least 0")
        for name in ("adaptive_epsilon", "adaptive_maximum"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("patch_width", "patch_layers", "norm_samples"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


class Discriminator(nn.Module):
    """A judge of images: (B, 3, H, W) in [0, 1] -> logits (B, L) float32, higher is more real.

    A forward pass changes no state, so that micro-batches add up to the large batch.
    """

    @property
    def trained(self) -> nn.Module:
        """The part that learns, which is what a checkpoint holds."""
        return self

    def fingerprint(self) -> str | None:
        """Return a hash of the frozen part; None without one."""
        return None

    def view(self, images: Tensor, generators: Iterable[torch.Generator]) -> Tensor:
        """Return images (B, 3, H, W) as the discriminator shall see them, image i drawn from generator i."""
        return images

    def as_fakes(self, images: Tensor) -> Tensor:
        """Return reconstructions as the discriminator's own update shall see them."""
        return images

    def begin_update(self) -> None:
        """Change, once per update of the discriminator, what changes beside its gradient step."""


class LocalBatchNorm(nn.Module):
    """StyleGAN-T's BatchNormLocal with a virtual batch of one: statistics over the tokens of each single sample.

    So a sample's logits depend on no other sample. x (B, C, N) -> (B, C, N) float32.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, N) over N."""
        return F.instance_norm(x.float(), weight=self.weight, bias=self.bias, eps=self.eps)


def _spectral_conv(channels: int, out_channels: int, kernel_size: int) -> nn.Module:
    layer = nn.Conv1d(channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")
    return parametrizations.spectral_norm(layer)


def _block(channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(_spectral_conv(channels, channels, kernel_size), LocalBatchNorm(channels), nn.LeakyReLU(0.2))


class TokenHead(nn.Module):
    """StyleGAN-T's head: tokens (B, C, N) -> one logit per token (B, N)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.block = _block(channels, 1)
        self.residual = _block(channels, kernel_size)
        self.logits = _spectral_conv(channels, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, N) float32 of tokens (B, C, N)."""
        x = self.block(tokens)
        x = (self.residual(x) + x) / math.sqrt(2.0)
        return self.logits(x).squeeze(1).float()


class DinoDiscriminator(Discriminator):
    """Trainable heads on the patch tokens of a frozen DINO ViT.

    One head reads the last block's output and one each of `blocks`; the class token is dropped and no final norm is
    applied, as in RAE's training code. RAE also zeroes the backbone's key biases; they cancel in the softmax, so
    nothing is done here.

    Spectral norms take their power iteration only in `begin_update`, once per update of the discriminator.

    Args:
        backbone: the ViT, without pooling layer; its config's `image_size` is what images are resized to.
        blocks: 0-based blocks whose outputs the heads read.
        kernel_size: odd width of the residual convolution over the tokens in row-major order (circular).

    Raises:
        UserError: when a block does not exist or the kernel is even.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, backbone: ViTModel, blocks: Sequence[int] = DEFAULT_BLOCKS, kernel_size: int = 9) -> None:
        super().__init__()
        depth, width = backbone.config.num_hidden_layers, backbone.config.hidden_size
        if not blocks or not all(0 <= block < depth for block in blocks):
            raise UserError(f"adversarial.blocks: {list(blocks)} given; the backbone has blocks 0 to {depth - 1}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"adversarial.kernel_size: {kernel_size} given; an odd positive number is needed")
        self.backbone = backbone.requires_grad_(False).eval()
        self.blocks = (depth - 1, *blocks)
        self.image_size = cast(int, backbone.config.image_size)
        self.heads = nn.ModuleList(TokenHead(width, kernel_size) for _ in self.blocks)
        self.register_buffer("image_mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        super().train(False)

    @classmethod
    def from_pretrained(
        cls,
        backbone: str = DEFAULT_BACKBONE,
        blocks: Sequence[int] = DEFAULT_BLOCKS,
        kernel_size: int = 9,
        local_files_only: bool = False,
    ) -> DinoDiscriminator:
        """Load the frozen ViT from a local folder or a Hub id; the heads get random weights.

        Raises:
            UserError: when the weights are not there or not a ViT's.
        """
        return cls(_load_backbone(backbone, local_files_only), blocks, kernel_size)

    def train(self, mode: bool = True) -> DinoDiscriminator:
        """Stay in eval mode: nothing here depends on it but the spectral norms, which are updated by request."""
        return self

    @property
    def trained(self) -> nn.Module:
        """The heads."""
        return self.heads

    def fingerprint(self) -> str:
        """Return a sha256 over the frozen backbone's weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def view(self, images: Tensor, generators: Iterable[torch.Generator]) -> Tensor:
        """Augment; see `augment`."""
        return augment(images, generators)

    def as_fakes(self, images: Tensor) -> Tensor:
        """Quantise; see `quantised`."""
        return quantised(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, heads x tokens) float32 of images (B, 3, H, W) in [0, 1]; higher is more real.

        Images are resized (bilinear, no antialias) to the backbone's input. Gradients flow to images and heads.
        """
        size = (self.image_size, self.image_size)
        x = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
        states = self.backbone((x - self.image_mean) / self.image_std, output_hidden_states=True).hidden_states
        features = [states[block + 1][:, 1:].transpose(1, 2) for block in self.blocks]
        return torch.cat([head(x) for head, x in zip(self.heads, features, strict=True)], dim=1)

    @torch.no_grad()
    def begin_update(self) -> None:
        """Take one power iteration in every spectral norm."""
        for layer in self.heads.modules():
            if nn.utils.parametrize.is_parametrized(layer, "weight"):
                norms = cast(nn.ModuleDict, layer.parametrizations)["weight"].train(True)
                _ = layer.weight  # reading the weight in train mode is what advances the iteration
                norms.train(False)


def _load_backbone(name: str, local_files_only: bool) -> ViTModel:
    from transformers import ViTModel

    hint = (
        f"give a local folder or `{DEFAULT_BACKBONE}` (adversarial.backbone=...), or train without the discriminator "
        "(adversarial.weight=0)"
    )
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"adversarial.backbone: no folder {name}; {hint}")
    try:
        files = find_encoder(name, None, local_files_only)
        family = vision_family(files)
        kind = files.config.get("model_type")
        if kind != "vit":
            raise UserError(f"{name} is of type {kind!r}, a ViT is needed")
        config = transformers_config(family, files.config, f"{name}:config.json")
        return cast(
            "ViTModel", load_pretrained(ViTModel, files.weights(family), name, config=config, add_pooling_layer=False)
        )
    except UserError as error:
        raise UserError(f"adversarial.backbone: {str(error).removeprefix('encoder ')}; {hint}") from error


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the discriminator's loss, a scalar: 1/2 mean[relu(1 - D(x)) + relu(1 + D(x_hat))]."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the decoder's adversarial loss of each sample (B,): -mean D(x_hat), from logits (B, L)."""
    return -fake_logits.mean(1)


def adaptive_weight(
    reconstruction_gradient: Tensor, adversarial_gradient: Tensor, epsilon: float = 1e-6, maximum: float = 1e4
) -> Tensor:
    """Return VQGAN's weight clamp(|g_rec| / (|g_adv| + epsilon), 0, maximum), a scalar.

    Both gradients are of the same weight (the decoder's last one), of any equal shape.
    """
    return (reconstruction_gradient.norm() / (adversarial_gradient.norm() + epsilon)).clamp(0.0, maximum)


def quantised(images: Tensor) -> Tensor:
    """Round images in about [0, 1] to 8 bit, as files hold them, so that fractions do not give fakes away."""
    return (images.clamp(0.0, 1.0) * 255.0).round() / 255.0


def augment(images: Tensor, generators: Iterable[torch.Generator]) -> Tensor:
    """DiffAugment "color, translation" (no cutout), image i drawn from generator i; differentiable.

    Brightness, saturation, contrast, then a shift of at most 1/8 of each side; what comes in is mid-grey, because the
    original works on [-1, 1] and fills with 0.

    Args:
        images: (B, 3, H, W) in [0, 1].
        generators: one per image, on the CPU.

    Returns:
        (B, 3, H, W), not clamped.
    """
    return torch.stack(list(_augmented(images, generators)))


def _augmented(images: Tensor, generators: Iterable[torch.Generator]) -> Iterator[Tensor]:
    height, width = images.shape[-2:]
    limits = [int(side * _TRANSLATION + 0.5) for side in (height, width)]
    for image, generator in zip(2.0 * images - 1.0, generators, strict=True):
        brightness, saturation, contrast = torch.rand(3, generator=generator).tolist()
        down, right = (int(torch.randint(-n, n + 1, (), generator=generator)) for n in limits)
        x = image + (brightness - 0.5)
        grey = x.mean(0, keepdim=True)
        x = (x - grey) * (2.0 * saturation) + grey
        mean = x.mean()
        x = (x - mean) * (contrast + 0.5) + mean
        x = F.pad(x, (limits[1], limits[1], limits[0], limits[0]))
        top, left = limits[0] - down, limits[1] - right
        yield 0.5 * x[:, top : top + height, left : left + width] + 0.5

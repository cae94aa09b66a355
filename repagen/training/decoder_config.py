"""The configuration of decoder training: `-m repagen.training.decoder --config NAME_OR_PATH [key=value ...]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from repagen.config import require
from repagen.data import DataConfig
from repagen.encoders import Combination
from repagen.errors import UserError
from repagen.models.autoencoder_representation import DECODER_SIZES
from repagen.training.discriminator import AdversarialConfig
from repagen.training.ema import EmaConfig
from repagen.training.optimizer import OptimizerConfig
from repagen.training.perceptual import LpipsConfig
from repagen.training.run_config import RunConfig


@dataclass
class KLConfig:
    """A new `AutoencoderKL` of diffusers, for `autoencoder.kind: kl`; the defaults are LDM's kl-f8 (SD-VAE).

    Attributes:
        weight: of the Kullback-Leibler divergence from N(0, I), summed over the elements of a latent, beside losses
            that are means over pixel values.
        channels: of the latent.
        widths: channels of each resolution; every one but the last is followed by a halving.
        blocks: residual blocks per resolution (the decoder has one more).
        norm_groups: of the group norms; divides every width.
        attention: in the middle block.
        scaling_factor: of the released latents where no statistics are computed.
    """

    weight: float = 1e-6
    channels: int = 4
    widths: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    blocks: int = 2
    norm_groups: int = 32
    attention: bool = True
    scaling_factor: float = 0.18215

    def validate(self) -> None:
        """Check the ranges."""
        require(self.weight >= 0, "weight", self.weight, "at least 0")
        require(self.channels >= 1, "channels", self.channels, "at least 1")
        require(self.blocks >= 1, "blocks", self.blocks, "at least 1")
        require(self.scaling_factor > 0, "scaling_factor", self.scaling_factor, "above 0")
        fits = bool(self.widths) and all(width > 0 and width % self.norm_groups == 0 for width in self.widths)
        require(fits, "widths", self.widths, f"positive multiples of norm_groups={self.norm_groups}")


@dataclass
class SVGConfig:
    """The trained parts of a new `SVGAutoencoder`, for `autoencoder.kind: svg`; see its arguments of the same names.

    Attributes:
        use_residual: without, only the decoder is trained, on the encoder's tokens.
        residual_channels, residual_hidden_size, residual_num_layers, residual_num_heads, residual_intermediate_size,
            residual_dropout: of the residual encoder.
        mask_probability: of replacing an image's residual by the mask token.
        matching: what `encode` matches residuals by; training matches by the global batch.
        decoder_up_block_types, decoder_block_out_channels, decoder_layers_per_block, norm_num_groups: of the decoder.
        dropout_samples: how many consecutive samples share one draw of the dropout and one pass of the residual
            encoder; every micro-batch holds a multiple of them, so that the loss does not depend on the split.
    """

    use_residual: bool = True
    residual_channels: int = 8
    residual_hidden_size: int = 384
    residual_num_layers: int = 6
    residual_num_heads: int = 8
    residual_intermediate_size: int = 1536
    residual_dropout: float = 0.1
    mask_probability: float = 0.1
    matching: Literal["running", "batch", "none"] = "running"
    decoder_up_block_types: list[str] = field(
        default_factory=lambda: ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4]
    )
    decoder_block_out_channels: list[int] = field(default_factory=lambda: [128, 128, 256, 256, 512])
    decoder_layers_per_block: int = 2
    norm_num_groups: int = 32
    dropout_samples: int = 1

    def validate(self) -> None:
        """Check what the class does not."""
        require(self.dropout_samples >= 1, "dropout_samples", self.dropout_samples, "at least 1")


# Keys that belong to some kinds only: given for another one they would be without effect.
_KEYS_OF_KINDS = {
    "decoder": ("representation",),
    "decoder_patch_size": ("representation",),
    "layers": ("representation",),
    "combination": ("representation",),
    "noise_tau": ("representation",),
    "normalised_pixels": ("representation",),
    "svg": ("svg",),
    "kl": ("kl",),
    "include_encoder": ("representation", "svg"),
    "norm_affine": ("representation",),
}


@dataclass
class TrainedAutoencoderConfig:
    """The autoencoder that is trained; its image side is `data.image_size`.

    Attributes:
        kind: `representation` (RAE, RAEv2: a ViT decoder on a frozen encoder), `svg` (a residual encoder beside the
            frozen one, and a convolutional decoder) or `kl` (`AutoencoderKL`, encoder and decoder).
        encoder: local folder, Hub id, `timm:NAME`, or `digits` for the bundled one; `kl` has none.
        revision: branch, tag or commit of the encoder on the Hub.
        pretrained: folder or Hub id of an autoencoder to go on from, in place of the encoder and all sizes.
        decoder: `vit-b`, `vit-l`, `vit-xl`, or the four `decoder_*` sizes of `RepresentationAutoencoder`.
        decoder_patch_size: side in pixels of the patch that a token becomes; None: 16.
        layers: `last`, or 0-based blocks of the encoder.
        combination: how several layers become one.
        norm_affine: keep the affine part of the encoder's final norm (RAEv2 with SigLIP2); SVG always does.
        noise_tau: sigma = noise_tau * u, u ~ U(0, 1) per sample, of the noise on the tokens; RAE 0.8.
        normalised_pixels: the decoder's output is in the encoder's normalised pixels (RAE), or in [0, 1] as it is
            (RAEv2).
        svg: of `kind: svg`.
        kl: of `kind: kl`; with `pretrained` only its weight counts.
        include_encoder: save the encoder's weights in the released folder; None: where their licence allows it.
    """

    kind: Literal["representation", "svg", "kl"] = "representation"
    encoder: str | None = None
    revision: str | None = None
    pretrained: str | None = None
    decoder: Literal["vit-b", "vit-l", "vit-xl"] | dict[str, Any] = "vit-xl"
    decoder_patch_size: int | None = None
    layers: Literal["last"] | list[int] = "last"
    combination: Combination = "last"
    norm_affine: bool = False
    noise_tau: float = 0.8
    normalised_pixels: bool = True
    svg: SVGConfig = field(default_factory=SVGConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    include_encoder: bool | None = None

    def validate(self) -> None:
        """Check that there is one source, that every key has an effect, and the sizes' names."""
        if self.kind == "kl":
            require(self.encoder is None, "encoder", self.encoder, "left out: kind=kl trains its own")
        elif (self.encoder is None) == (self.pretrained is None):
            raise UserError("encoder: give either an encoder or a pretrained autoencoder to go on from, not both")
        default = type(self)(encoder="")
        for name, kinds in _KEYS_OF_KINDS.items():
            if self.kind not in kinds and getattr(self, name) != getattr(default, name):
                raise UserError(f"{name}: has no effect with kind={self.kind}; leave it out, or set kind={kinds[0]}")
        if isinstance(self.decoder, dict):
            names = sorted(DECODER_SIZES["vit-b"])
            require(sorted(self.decoder) == names, "decoder", sorted(self.decoder), f"sizes for {', '.join(names)}")
        require(
            self.decoder_patch_size is None or self.decoder_patch_size >= 1,
            "decoder_patch_size",
            self.decoder_patch_size,
            "at least 1",
        )
        require(self.noise_tau >= 0, "noise_tau", self.noise_tau, "at least 0")


@dataclass
class ReconstructionConfig:
    """Grids of images above their reconstructions, as PNG during training, from the EMA weights.

    Attributes:
        every_steps: a grid after every so many optimiser steps; 0: none.
        num_images: pairs in a grid; images are taken at even distances from the dataset, without random augmentation.
    """

    every_steps: int = 0
    num_images: int = 8

    def validate(self) -> None:
        """Check the ranges."""
        require(self.every_steps >= 0, "every_steps", self.every_steps, "at least 0")
        require(self.num_images >= 1, "num_images", self.num_images, "at least 1")


@dataclass(kw_only=True)
class DecoderConfig(RunConfig):
    """Everything about one training of an autoencoder.

    Attributes:
        data: images.
        autoencoder: what is trained.
        l1_weight: of the mean absolute error of pixels in [0, 1]; RAE 1. LDM, SVG and REPA-E take it in [-1, 1],
            which is a weight of 2.
        lpips, adversarial: parts of the loss beside L1; weight 0 switches each off.
        optimizer, ema: as everywhere.
        sample: reconstruction grids during training.
        statistics: compute the latent statistics of `data` at the end and release the autoencoder with them, ready for
            a generator; without, they are those of `autoencoder.pretrained`, or none.
    """

    data: DataConfig
    autoencoder: TrainedAutoencoderConfig
    l1_weight: float = 1.0
    lpips: LpipsConfig = field(default_factory=LpipsConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sample: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    statistics: bool = True

    @property
    def releases_pipeline(self) -> bool:
        """See `RunConfig`: an autoencoder."""
        return False

    def validate(self) -> None:
        """Check the ranges."""
        super().validate()
        require(self.data.kind != "latents", "data.kind", self.data.kind, "a kind of images; latents have none")
        require(self.l1_weight > 0, "l1_weight", self.l1_weight, "above 0")

"""SVG's autoencoder (arXiv 2510.15301): frozen DINOv3 tokens, a few channels of trained residual, a conv decoder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from repagen.encoders.images import IMAGENET_MEAN, IMAGENET_STD
from repagen.encoders.spec import EncoderSpec
from repagen.errors import UserError
from repagen.models.autoencoder_base import (
    FrozenEncoderAutoencoder,
    LatentStandardisation,
    check_latents,
    check_positive,
)

if TYPE_CHECKING:
    from repagen.encoders import VisionEncoder

Matching = Literal["running", "batch", "none"]

_MATCHING_EPSILON = 1e-6
_RUNNING_MOMENTUM = 0.01


class ResidualEncoder(nn.Module):
    """ViT that turns pixels into a few channels per patch: torchvision's, with an MLP on the patch tokens as head.

    Args:
        channels: of the residual.
        image_size: side in pixels of its images.
        patch_size: side in pixels of a patch.
        dim, layers, heads, intermediate_size: sizes of the transformer.
        dropout: of its activations and attention, in training mode.
    """

    def __init__(
        self,
        channels: int,
        image_size: int,
        patch_size: int,
        dim: int,
        layers: int,
        heads: int,
        intermediate_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        from torchvision.models import VisionTransformer  # costs a second to import

        self.patch_size, self.grid_size = patch_size, image_size // patch_size
        self.network: Any = VisionTransformer(
            image_size=image_size,
            patch_size=patch_size,
            num_layers=layers,
            num_heads=heads,
            hidden_dim=dim,
            mlp_dim=intermediate_size,
            dropout=dropout,
            attention_dropout=dropout,
            num_classes=channels,
        )
        self.network.heads = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, channels))

    def forward(self, images: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Encode images (B, 3, H, W) in [0, 1], resized (bicubic) where they are not of the grid's patches.

        float64 images are normalised in float64.

        Args:
            images: of the proportions of the grid.
            grid: rows and columns of patches; its own by default. The learned positions are interpolated (bicubic).

        Returns:
            (B, channels, N), row-major.
        """
        grid = grid or (self.grid_size, self.grid_size)
        pixels = images if images.dtype == torch.float64 else images.float()
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if images.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (pixels - mean) / std
        patches = self.network.conv_proj(pixels.to(self.network.class_token.dtype)).flatten(2).transpose(1, 2)
        class_token = self.network.class_token.expand(len(patches), -1, -1).to(patches.dtype)
        encoder = self.network.encoder
        states = encoder.dropout(torch.cat([class_token, patches], dim=1) + self._positions(grid))
        return self.network.heads(encoder.ln(encoder.layers(states))[:, 1:]).transpose(1, 2)

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """The learned table (1, 1 + N, dim) of a grid, that of the class token first."""
        table, own = self.network.encoder.pos_embedding, (self.grid_size, self.grid_size)
        if grid == own:
            return table
        image = table[:, 1:].float().transpose(1, 2).unflatten(2, own)
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False).to(table.dtype)
        return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2)], dim=1)


class DistributionMatching(nn.Module):
    """Gives residuals the mean and deviation of the encoder's tokens (SVG equation 6).

    The official code takes both of the batch, in use as in training, so that an image's latent depends on its
    neighbours (`matching="batch"`). Averages over training make it a function of the image (`matching="running"`).

    The scalars are, in this order, mean and deviation of the encoder's channels, then of the residual's: each the
    average over channels of the channel's mean or unbiased deviation over batch and tokens.
    """

    scalars: torch.Tensor
    updates: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scalars", torch.zeros(4))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, residual: torch.Tensor, scalars: torch.Tensor) -> torch.Tensor:
        """Match a residual (B, r, N) by scalars (4,); float32."""
        encoder_mean, encoder_std, residual_mean, residual_std = scalars.float().unbind()
        return (residual.float() - residual_mean) / (residual_std + _MATCHING_EPSILON) * encoder_std + encoder_mean

    @staticmethod
    @torch.no_grad()
    def of_batch(features: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the scalars (4,) of features (B, D, N) and residual (B, r, N); float32, without gradient."""
        moments = [
            moment
            for tokens in (features.float(), residual.float())
            for moment in (tokens.mean(dim=(0, 2)).mean(), tokens.std(dim=(0, 2)).mean())
        ]
        return torch.stack(moments)

    @staticmethod
    def of_channels(mean: torch.Tensor, std: torch.Tensor, encoder_width: int) -> torch.Tensor:
        """Return the scalars (4,) from the mean and deviation (C,) of the encoder's channels, then the residual's."""
        parts = [moment.split([encoder_width, len(moment) - encoder_width]) for moment in (mean, std)]
        return torch.stack([moment[part].mean() for part in (0, 1) for moment in parts])

    def running(self) -> torch.Tensor:
        """Return the running scalars (4,).

        Raises:
            UserError: if there are none yet.
        """
        if self.updates == 0:
            raise UserError(
                "matching='running': this autoencoder has no running scalars; train it, call "
                "calibrate_matching(batches), or encode with matching='batch'"
            )
        return self.scalars

    @torch.no_grad()
    def update(self, scalars: torch.Tensor) -> None:
        """Move the running scalars towards those of a training batch: a mean at first, then with momentum 0.01."""
        self.updates += 1
        weight = max(1 / int(self.updates), _RUNNING_MOMENTUM)
        self.scalars.lerp_(scalars.to(self.scalars), weight)

    def set(self, scalars: torch.Tensor) -> None:
        """Set the running scalars; training goes on from them with momentum 0.01."""
        self.scalars.copy_(scalars)
        self.updates.fill_(round(1 / _RUNNING_MOMENTUM))


class SVGAutoencoder(FrozenEncoderAutoencoder, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin):
    """Images to frozen encoder tokens with a trained residual beside them, and back by LDM's convolutional decoder.

    Trained are `residual_encoder`, `mask_token` and `decoder`: all its parameters. The encoder is no sub-module; see
    `FrozenEncoderAutoencoder`. Statistics are per channel, so that latents of any grid are decoded.

    Args:
        encoder: fields of `repagen.encoders.EncoderSpec`; None for an autoencoder that only decodes. SVG reads DINOv3
            with the affine part of its final norm.
        encoder_channels: the encoder's width D; the first D channels of a latent.
        latent_size: rows and columns of the latent of a square that it is made for, the encoder's token grid. The
            square's side is this times 2 per level of the decoder but the last (256 px for 16).
        use_residual: False leaves the residual out: C = D, pure encoder tokens.
        residual_channels: channels r of the residual; a latent has C = D + r.
        residual_hidden_size, residual_num_layers, residual_num_heads, residual_intermediate_size, residual_dropout:
            of the `ResidualEncoder`.
        mask_probability: of replacing an image's residual by `mask_token` in training.
        matching: where `encode` takes the scalars of `DistributionMatching` from: "running" or "batch" (as official);
            "none" leaves residuals as they are (officially use_outnorm: false).
        decoder_up_block_types, decoder_block_out_channels, decoder_layers_per_block, norm_num_groups: of diffusers'
            `Decoder` (of `AutoencoderKL`); block types from the lowest resolution on, channels from the highest.
        encoder_fingerprint: `VisionEncoder.fingerprint()` of the encoder that the rest was made with.
        encoder_stored: whether a saved folder holds the encoder's weights (sub-folder `encoder.frozen`).

    Raises:
        UserError: for sizes that cannot be, naming the argument.
    """

    config: Any
    gradient_checkpointing: bool
    _encoder: Any

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["EncoderBlock", "ResnetBlock2D"]
    _repeated_blocks: ClassVar[list[str]] = ["ResnetBlock2D"]
    # `encode` and `decode` call these without the model's own forward, on which group offloading would wait.
    _group_offload_block_modules: ClassVar[list[str]] = [
        "residual_encoder", "distribution_matching", "latent_statistics", "decoder",
    ]  # fmt: skip
    _keep_in_fp32_modules: ClassVar[list[str]] = ["distribution_matching", "latent_statistics"]

    @register_to_config
    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        encoder_channels: int = 384,
        latent_size: int = 16,
        use_residual: bool = True,
        residual_channels: int = 8,
        residual_hidden_size: int = 384,
        residual_num_layers: int = 6,
        residual_num_heads: int = 8,
        residual_intermediate_size: int = 1536,
        residual_dropout: float = 0.1,
        mask_probability: float = 0.1,
        matching: Matching = "running",
        decoder_up_block_types: Sequence[str] = ("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4),
        decoder_block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        decoder_layers_per_block: int = 2,
        norm_num_groups: int = 32,
        encoder_fingerprint: str | None = None,
        encoder_stored: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(
            encoder_channels=encoder_channels,
            latent_size=latent_size,
            residual_channels=residual_channels,
            residual_hidden_size=residual_hidden_size,
            residual_num_layers=residual_num_layers,
            residual_num_heads=residual_num_heads,
            residual_intermediate_size=residual_intermediate_size,
            decoder_layers_per_block=decoder_layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        _check_probabilities(residual_dropout=residual_dropout, mask_probability=mask_probability)
        _check_matching(matching)
        _check_decoder(decoder_up_block_types, decoder_block_out_channels, norm_num_groups)
        if encoder is not None:
            self.register_to_config(encoder=dataclasses.asdict(EncoderSpec.from_mapping(encoder)))
        if use_residual:
            self.residual_encoder = ResidualEncoder(
                residual_channels,
                self.image_size,
                self.patch_size,
                residual_hidden_size,
                residual_num_layers,
                residual_num_heads,
                residual_intermediate_size,
                residual_dropout,
            )
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, residual_channels, 1))
            self.distribution_matching = DistributionMatching()
        self.decoder = Decoder(
            in_channels=self.latent_shape[0],
            out_channels=3,
            up_block_types=tuple(decoder_up_block_types),
            block_out_channels=tuple(decoder_block_out_channels),
            layers_per_block=decoder_layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        self.latent_statistics = LatentStandardisation((self.latent_shape[0], 1, 1))
        self.use_slicing = False
        self._without_encoder()

    @classmethod
    def from_encoder(
        cls,
        encoder: str | os.PathLike[str] | VisionEncoder,
        image_size: int = 256,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **sizes: Any,
    ) -> SVGAutoencoder:
        """Make an autoencoder with new trained parts for an encoder.

        Args:
            encoder: a folder, a Hub id, `timm:NAME` or an encoder (its weights are shared, not changed). SVG:
                "facebook/dinov3-vits16plus-pretrain-lvd1689m".
            image_size: side in pixels of the images. The token grid is this divided by 2 per level of the decoder but
                the last, and the encoder sees images of that many of its own patches.
            revision, local_files_only: see `VisionEncoder.from_pretrained`.
            sizes: other arguments of the constructor.

        Raises:
            UserError: for sizes that do not divide, or an encoder that cannot be loaded.
        """
        from repagen.encoders import VisionEncoder

        levels = len(sizes.get("decoder_block_out_channels", range(5)))
        patch = 2 ** (levels - 1)
        if image_size <= 0 or image_size % patch:
            raise UserError(f"image_size: {image_size} px is no positive multiple of the decoder's patch {patch} px")
        grid = image_size // patch
        if not isinstance(encoder, VisionEncoder):
            encoder = VisionEncoder.from_pretrained(
                encoder, revision=revision, grid_size=grid, local_files_only=local_files_only
            )
        if encoder.grid_size != grid:
            raise UserError(
                f"image_size: {image_size} px is not the encoder's grid {encoder.grid_size} times the decoder's patch "
                f"{patch} px"
            )
        model = cls(
            encoder=dataclasses.asdict(encoder.spec()),
            encoder_channels=encoder.hidden_size,
            latent_size=grid,
            encoder_fingerprint=encoder.fingerprint(),
            **sizes,
        )
        object.__setattr__(model, "_encoder", encoder)
        return model

    @property
    def patch_size(self) -> int:
        """See `StandardisedLatents.patch_size`."""
        return 2 ** (len(self.config.decoder_block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `StandardisedLatents.latent_shape`."""
        residual = self.config.residual_channels if self.config.use_residual else 0
        return (self.config.encoder_channels + residual, self.config.latent_size, self.config.latent_size)

    @property
    def latents_depend_on_batch(self) -> bool:
        """See `StandardisedLatents.latents_depend_on_batch`: with `matching="batch"`, the official behaviour."""
        return self.config.use_residual and self.config.matching == "batch"

    @property
    def encoder_width(self) -> int:
        """Channels of a latent that come from the encoder."""
        return self.config.encoder_channels

    def encoding_facts(self) -> tuple[list[Any], list[torch.Tensor]]:
        """See `StandardisedLatents.encoding_facts`."""
        if not self.config.use_residual:
            return [], []
        running = [self.distribution_matching.scalars] if self.config.matching == "running" else []
        return [self.config.matching], [*self.residual_encoder.state_dict().values(), *running]

    @apply_forward_hook
    def encode(
        self,
        images: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        matching: Matching | None = None,
        grid: tuple[int, int] | None = None,
    ) -> EncoderOutput | tuple[torch.Tensor]:
        """Encode images.

        Args:
            images: (B, 3, H, W) float in [0, 1], resized (bicubic) where they are not of the grid's patches.
            return_dict: return an `EncoderOutput` rather than a tuple.
            generator: of the training masks; in eval mode there are none.
            matching: in place of the config's; "batch" makes latents depend on the other images of the batch. In
                training mode it is the batch's in any case.
            grid: rows and columns (h, w) of the latents, of the proportions of the images. By default `latent_size` of
                both for squares of any side, and one token a patch for others: `latent_grid(H, W)`.

        Returns:
            `.latent` (B, C, h, w), standardised.

        Raises:
            UserError: for other images, or `matching` "running" without running scalars.
        """
        if self.training:
            latents = self.training_latents(images, generator=generator, grid=grid).to(self.dtype)
        else:
            latents = self.latent_statistics(self.raw_latents(images, matching, grid)).to(self.dtype)
        return EncoderOutput(latent=latents) if return_dict else (latents,)

    @torch.no_grad()
    def raw_latents(
        self, images: torch.Tensor, matching: Matching | None = None, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Encode images (B, 3, H, W) to latents (B, C, h, w) float32 before standardisation; see `encode`.

        It has no gradient; `training_latents` has.
        """
        chosen = self.config.matching if matching is None else matching
        _check_matching(chosen)
        grid = self._grid_of(images, grid)
        batches = images.split(1) if self.use_slicing and len(images) > 1 else [images]
        features = torch.cat([self.encoder_features(batch, grid) for batch in batches])
        if not self.config.use_residual:
            return features.unflatten(2, grid)
        residual = torch.cat([self.residual_encoder(batch, grid) for batch in batches])
        if chosen == "none":
            return torch.cat([features, residual.float()], dim=1).unflatten(2, grid)
        match = self.distribution_matching
        scalars = match.of_batch(features, residual) if chosen == "batch" else match.running()
        return torch.cat([features, match(residual, scalars)], dim=1).unflatten(2, grid)

    def encoder_features(self, images: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the frozen encoder's tokens (B, D, N) float32 of images (B, 3, H, W), see `encode`; no gradient."""
        grid = self._grid_of(images, grid)
        return self._placed_encoder(images.device)(images, grid=grid).tokens.float().transpose(1, 2)

    def training_latents(
        self,
        images: torch.Tensor,
        mask: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        scalars: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Encode images for training: residuals masked, then matched by their batch, with gradient to their encoder.

        In training mode the scalars also move the running ones.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            mask: (B,) bool, the images whose residual is replaced by `mask_token`; drawn from `generator` if None.
            features: (B, D, N) `encoder_features` of the images, where they are known already.
            scalars: (4,) of `DistributionMatching.of_batch`, where the batch is a part of a larger one.
            generator: of the masks that are not given.
            grid: see `encode`.

        Returns:
            (B, C, h, w) float32, standardised: what `decode` takes. A new autoencoder has no statistics yet, and these
            are the raw latents.

        Raises:
            UserError: for other images, or a mask of another length.
        """
        grid = self._grid_of(images, grid)
        features = self.encoder_features(images, grid) if features is None else features
        if not self.config.use_residual:
            return self.latent_statistics(features.unflatten(2, grid))
        residual = self.residual_encoder(images, grid)
        if mask is None:
            device = generator.device if generator is not None else residual.device
            mask = torch.rand(len(residual), generator=generator, device=device) < self.config.mask_probability
        if mask.shape != residual.shape[:1]:
            raise UserError(f"mask must have shape ({len(residual)},), one value per image, got {tuple(mask.shape)}")
        residual = torch.where(mask.to(residual.device).view(-1, 1, 1), self.mask_token.to(residual.dtype), residual)
        if self.config.matching != "none":
            scalars = self.distribution_matching.of_batch(features, residual) if scalars is None else scalars
            if self.training:
                self.distribution_matching.update(scalars)
            residual = self.distribution_matching(residual, scalars)
        return self.latent_statistics(torch.cat([features, residual.float()], dim=1).unflatten(2, grid))

    @torch.no_grad()
    def calibrate_matching(self, batches: Iterable[torch.Tensor]) -> None:
        """Set the running scalars to those of given images, as if they were one batch; the config follows.

        Args:
            batches: images (B, 3, H, W) float in [0, 1].

        Raises:
            UserError: without a residual or without images.
        """
        if not self.config.use_residual:
            raise UserError("calibrate_matching: use_residual is False, there is nothing to match")
        sums: torch.Tensor | None = None
        training = self.training
        self.eval()
        for images in batches:
            grid = self._grid_of(images, None)
            residual = self.residual_encoder(images, grid).float()
            tokens = torch.cat([self.encoder_features(images, grid), residual], dim=1)
            own = channel_sums(tokens)
            sums = own if sums is None else sums + own
        self.train(training)
        if sums is None:
            raise UserError("calibrate_matching: no images were given")
        match = self.distribution_matching
        match.set(match.of_channels(*channel_moments(sums), self.encoder_width))
        self.register_to_config(matching="running")

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents; never touches the encoder.

        Args:
            latents: (B, C, h, w), standardised, of any grid.
            return_dict: return a `DecoderOutput` rather than a tuple.

        Returns:
            `.sample` (B, 3, H, W), about [0, 1], not clamped.

        Raises:
            UserError: for latents of another number of channels.
        """
        check_latents(latents, self.latent_shape[0])
        batches = latents.split(1) if self.use_slicing and len(latents) > 1 else [latents]
        images = torch.cat([self._decode(batch) for batch in batches])
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        sample: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        mask: torch.Tensor | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Reconstruct images (B, 3, H, W) in [0, 1]; in training mode with the masks of `training_latents`.

        Args:
            sample: the images.
            return_dict: return a `DecoderOutput` rather than a tuple.
            generator, mask: see `training_latents`; `mask` applies in either mode.
        """
        if mask is not None:
            latents = self.training_latents(sample, mask)
        else:
            latents = self.encode(sample, return_dict=False, generator=generator)[0]
        return self.decode(latents, return_dict=return_dict)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        raw = self.latent_statistics(latents, undo=True)
        # The official decoder gives [-1, 1].
        return (self.decoder(raw.to(self.dtype)).float() / 2 + 0.5).to(latents.dtype)


def channel_sums(tokens: torch.Tensor) -> torch.Tensor:
    """Return count, sum and sum of squares of each channel of (B, C, N): (C, 3) float64; those of parts add up."""
    values = tokens.double().transpose(0, 1).flatten(1)
    count = torch.full((len(values),), values.shape[1], dtype=values.dtype, device=values.device)
    return torch.stack([count, values.sum(1), values.square().sum(1)], dim=1)


def channel_moments(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and unbiased standard deviation (C,) of each channel from `channel_sums`."""
    count, total, squares = sums.unbind(1)
    mean = total / count
    return mean, ((squares - count * mean.square()).clamp(min=0) / (count - 1)).sqrt()


def _check_matching(matching: Any) -> None:
    if matching not in get_args(Matching):
        raise UserError(f"matching: {matching!r} is none of {', '.join(get_args(Matching))}")


def _check_sizes(**sizes: Any) -> None:
    check_positive(**sizes)
    width, heads = sizes["residual_hidden_size"], sizes["residual_num_heads"]
    if width % heads:
        raise UserError(f"residual_hidden_size: {width} must be a multiple of its {heads} attention heads")


def _check_probabilities(**probabilities: Any) -> None:
    for name, value in probabilities.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
            raise UserError(f"{name}: {value!r} must be a number from 0 to below 1")


def _check_decoder(block_types: Sequence[str], channels: Sequence[int], groups: int) -> None:
    allowed = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    if unknown := [name for name in block_types if name not in allowed]:
        raise UserError(f"decoder_up_block_types: {unknown[0]!r} is none of {', '.join(allowed)}")
    if len(block_types) != len(channels):
        raise UserError(
            f"decoder_up_block_types: {len(block_types)} names for {len(channels)} decoder_block_out_channels"
        )
    if bad := [width for width in channels if not isinstance(width, int) or width <= 0 or width % groups]:
        raise UserError(f"decoder_block_out_channels: {bad[0]!r} is no positive multiple of norm_num_groups {groups}")

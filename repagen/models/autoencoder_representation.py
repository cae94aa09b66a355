"""Representation autoencoder (RAE, arXiv 2510.11690): a frozen vision encoder and a trained ViT decoder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, EncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from repagen.encoders.images import IMAGENET_MEAN, IMAGENET_STD
from repagen.encoders.spec import Combination, EncoderSpec, Layers
from repagen.errors import UserError
from repagen.layers.attention import Attention, AttentionBackendMixin
from repagen.layers.embeddings import sincos_position_table, trained_sincos_table, unpatchify
from repagen.layers.norms import LayerNorm
from repagen.models.autoencoder_base import (
    FrozenEncoderAutoencoder,
    LatentStandardisation,
    check_latents,
    check_positive,
)

if TYPE_CHECKING:
    from repagen.encoders import VisionEncoder

DECODER_SIZES: dict[str, dict[str, int]] = {
    "vit-b": {
        "decoder_hidden_size": 768,
        "decoder_num_hidden_layers": 12,
        "decoder_num_attention_heads": 12,
        "decoder_intermediate_size": 3072,
    },
    "vit-l": {
        "decoder_hidden_size": 1024,
        "decoder_num_hidden_layers": 24,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
    },
    "vit-xl": {
        "decoder_hidden_size": 1152,
        "decoder_num_hidden_layers": 28,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
    },
}
"""RAE's decoders: 86M, 304M and 415M parameters at latent width 768; the last is the paper's default."""


class _Activated(nn.Module):
    """Linear, then the exact (erf) GELU."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, out_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(hidden_states))


class _Projected(nn.Module):
    """Linear."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, out_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense(hidden_states)


class RepresentationDecoderBlock(nn.Module):
    """Pre-norm ViT block of MAE: x += Attention(LN(x)); x += MLP(LN(x)). The residual stream is float32.

    Parameter names are those of diffusers' `AutoencoderRAE`.
    """

    def __init__(self, dim: int, heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads)
        self.intermediate = _Activated(dim, intermediate_size)
        self.output = _Projected(intermediate_size, dim)
        self.layernorm_before = LayerNorm(dim, eps=1e-12)
        self.layernorm_after = LayerNorm(dim, eps=1e-12)

    def forward(self, hidden_states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Apply to (B, L, dim) float32, the matrix products in `dtype`; (B, L, dim) float32."""
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states).to(dtype))
        return hidden_states + self.output(self.intermediate(self.layernorm_after(hidden_states).to(dtype)))


class RepresentationDecoder(nn.Module):
    """Tokens to patches of pixels (RAE's GeneralDecoder).

    Linear, a learned class token in front, fixed sine-cosine positions, blocks, LayerNorm, Linear without that token.

    Args:
        latent_channels: width C of a latent token.
        grid_size: tokens per row and column of the table of positions.
        patch_size: side p in pixels of the patch a token becomes.
        dim, layers, heads, intermediate_size: sizes of the transformer.
    """

    def __init__(
        self,
        latent_channels: int,
        grid_size: int,
        patch_size: int,
        dim: int,
        layers: int,
        heads: int,
        intermediate_size: int,
    ) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.decoder_embed = nn.Linear(latent_channels, dim)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Fixed here, but a parameter that is saved: training code un-freezes it, so published tables may be learned.
        positions = F.pad(sincos_position_table((grid_size, grid_size), dim), (0, 0, 1, 0))
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_layers = nn.ModuleList(
            RepresentationDecoderBlock(dim, heads, intermediate_size) for _ in range(layers)
        )
        self.decoder_norm = LayerNorm(dim, eps=1e-12)
        self.decoder_pred = nn.Linear(dim, patch_size**2 * 3)

    def forward(
        self,
        tokens: torch.Tensor,
        run: Callable[..., torch.Tensor] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Decode tokens.

        Args:
            tokens: (B, N, C), row-major on the grid.
            run: calls a block with its arguments; gradient checkpointing.
            grid: rows and columns, for which the positions are interpolated. None: tokens on any square, which are
                resized to the decoder's own (bilinear, after the first layer), as RAE does.

        Returns:
            (B, N, p * p * 3) without a grid (B, grid_size^2, p * p * 3), the channel running fastest within a patch.
        """
        embedded = self.decoder_embed(tokens)
        embedded = self._on_own_grid(embedded) if grid is None else embedded
        dtype = embedded.dtype
        cls_token = self.trainable_cls_token.expand(len(embedded), -1, -1)
        hidden_states = torch.cat([cls_token.float(), embedded.float()], dim=1) + self._positions(grid)
        for block in self.decoder_layers:
            hidden_states = run(block, hidden_states, dtype) if run else block(hidden_states, dtype)
        return self.decoder_pred(self.decoder_norm(hidden_states).to(dtype))[:, 1:]

    def load_exactly(self, state: Mapping[str, torch.Tensor], where: str) -> None:
        """Load tensors by name, all of them and no others.

        Args:
            state: this module's state dict.
            where: the file or class they come from, for messages.

        Raises:
            UserError: naming a tensor that is missing, left over or of another shape.
        """
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise UserError(f"{where}: {len(missing)} tensors of the decoder are missing, the first is {missing[0]}")
        if extra := sorted(state.keys() - own.keys()):
            raise UserError(f"{where}: {len(extra)} tensors belong to no RAE decoder, the first is {extra[0]}")
        for key, value in own.items():
            given, needed = tuple(state[key].shape), tuple(value.shape)
            if given != needed:
                raise UserError(f"{where}:{key}: shape {given} does not fit the decoder, which needs {needed}")
        self.load_state_dict(state)

    def _positions(self, grid: tuple[int, int] | None) -> torch.Tensor:
        """The table (1, 1 + N, dim) float32 of a grid, that of the class token first."""
        own = (self.grid_size, self.grid_size)
        if grid is None or grid == own:
            return self.decoder_pos_embed.float()
        cls_token, table = self.decoder_pos_embed.split([1, self.grid_size**2], dim=1)
        return torch.cat([cls_token.float(), trained_sincos_table(table, grid, own)], dim=1)

    def _on_own_grid(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == self.grid_size**2:
            return tokens
        side = round(tokens.shape[1] ** 0.5)
        image = tokens.transpose(1, 2).unflatten(2, (side, side))
        image = F.interpolate(image, size=(self.grid_size, self.grid_size), mode="bilinear", align_corners=False)
        return image.flatten(2).transpose(1, 2)


class RepresentationAutoencoder(
    FrozenEncoderAutoencoder, AttentionBackendMixin, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin
):
    """Images to standardised encoder tokens and back: RAE, and RAEv2 (arXiv 2605.18324) with several layers.

    The encoder is no sub-module; see `FrozenEncoderAutoencoder`.

    Args:
        encoder: fields of `repagen.encoders.EncoderSpec`, with `norm_affine` False unless it is given: RAE drops the
            affine part of the encoder's final norm, RAEv2 keeps it for SigLIP2. None for an autoencoder that only
            decodes.
        latent_channels: channels C of a latent, the encoder's width.
        latent_size: rows and columns of the latent of a square of `latent_size * decoder_patch_size` pixels, the
            encoder's token grid. Statistics and decoder are made for it, and interpolated for images of other sizes.
        decoder_patch_size: side in pixels of the image patch that one token becomes.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: sizes
            of the ViT decoder; see `DECODER_SIZES`.
        image_mean, image_std: the decoder's output times std plus mean is the image in [0, 1] (RAE: the encoder's
            normalisation; RAEv2, whose decoder speaks pixels: zeros and ones).
        noise_tau: training noise: sigma = noise_tau * u, u ~ U(0, 1) per sample, added to raw tokens in training mode.
        encoder_fingerprint: `VisionEncoder.fingerprint()` of the encoder the decoder and the statistics belong to.
        encoder_stored: whether a saved folder holds the encoder's weights (sub-folder `encoder.frozen`).

    Raises:
        UserError: for sizes that cannot be, naming the argument.
    """

    config: Any
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any
    _encoder: Any

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["RepresentationDecoderBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["RepresentationDecoderBlock"]
    # `decode` calls these without the model's own forward, on which group offloading would wait.
    _group_offload_block_modules: ClassVar[list[str]] = ["latent_statistics", "decoder"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "decoder_embed", "decoder_pos_embed", "trainable_cls_token", "norm", "latent_statistics",
    ]  # fmt: skip
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "decoder_pos_embed", "layernorm_before", "layernorm_after", "decoder_norm", "latent_statistics",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        latent_channels: int = 768,
        latent_size: int = 16,
        decoder_patch_size: int = 16,
        decoder_hidden_size: int = 1152,
        decoder_num_hidden_layers: int = 28,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        noise_tau: float = 0.8,
        encoder_fingerprint: str | None = None,
        encoder_stored: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(
            latent_channels=latent_channels,
            latent_size=latent_size,
            decoder_patch_size=decoder_patch_size,
            decoder_hidden_size=decoder_hidden_size,
            decoder_num_hidden_layers=decoder_num_hidden_layers,
            decoder_num_attention_heads=decoder_num_attention_heads,
            decoder_intermediate_size=decoder_intermediate_size,
        )
        _check_pixel_statistics(image_mean, image_std)
        if not isinstance(noise_tau, int | float) or isinstance(noise_tau, bool) or not 0 <= noise_tau < float("inf"):
            raise UserError(f"noise_tau: {noise_tau!r} must be a number, 0 or more")
        if encoder is not None:
            spec = EncoderSpec.from_mapping({"norm_affine": False, **encoder})
            self.register_to_config(encoder=dataclasses.asdict(spec))
        self.decoder = RepresentationDecoder(
            latent_channels,
            latent_size,
            decoder_patch_size,
            decoder_hidden_size,
            decoder_num_hidden_layers,
            decoder_num_attention_heads,
            decoder_intermediate_size,
        )
        self.latent_statistics = LatentStandardisation((latent_channels, latent_size, latent_size))
        self.use_slicing = False
        self.gradient_checkpointing = False
        self._without_encoder()

    @classmethod
    def from_encoder(
        cls,
        encoder: str | os.PathLike[str] | VisionEncoder,
        decoder: str | Mapping[str, int] = "vit-xl",
        image_size: int = 256,
        decoder_patch_size: int | None = None,
        noise_tau: float = 0.8,
        *,
        revision: str | None = None,
        layers: Layers = "last",
        combination: Combination = "last",
        norm_affine: bool = False,
        normalised_pixels: bool = True,
        local_files_only: bool = False,
    ) -> RepresentationAutoencoder:
        """Make an autoencoder with a new decoder for an encoder.

        Args:
            encoder: a folder, a Hub id, `timm:NAME` or an encoder (its weights are shared, not changed).
            decoder: "vit-b", "vit-l", "vit-xl", or the four `decoder_*` sizes of the constructor.
            image_size: side in pixels of the images.
            decoder_patch_size: side in pixels of the patch one token becomes; 16 by default, and
                `image_size / grid_size` for a given encoder. The token grid is `image_size / decoder_patch_size`, and
                the encoder sees images of that many of its own patches (RAE: 224 px at patch 14 for 256 px).
            noise_tau: see the constructor.
            revision, layers, combination, local_files_only: see `VisionEncoder.from_pretrained`; a given encoder has
                its own layers and combination.
            norm_affine: keep the affine part of the encoder's final norm (RAEv2 with SigLIP2) or drop it (RAE).
            normalised_pixels: the decoder's output is in the encoder's normalised pixels (RAE), or in [0, 1] as it is
                (RAEv2).

        Raises:
            UserError: for sizes that do not divide, an unknown decoder, or an encoder that cannot be loaded.
        """
        from repagen.encoders import VisionEncoder

        if isinstance(encoder, VisionEncoder):
            encoder = encoder.reading(norm_affine=norm_affine)
            patch = image_size // encoder.grid_size if decoder_patch_size is None else decoder_patch_size
            if patch * encoder.grid_size != image_size:
                raise UserError(
                    f"image_size: {image_size} px is not the encoder's grid {encoder.grid_size} times the decoder's "
                    f"patch {patch} px"
                )
        else:
            patch = 16 if decoder_patch_size is None else decoder_patch_size
            if patch <= 0 or image_size <= 0 or image_size % patch:
                raise UserError(
                    f"image_size: {image_size} px is no positive multiple of decoder_patch_size {patch} px"
                )
            encoder = VisionEncoder.from_pretrained(
                encoder,
                revision=revision,
                grid_size=image_size // patch,
                layers=layers,
                combination=combination,
                norm_affine=norm_affine,
                local_files_only=local_files_only,
            )
        model = cls(
            encoder=dataclasses.asdict(encoder.spec()),
            latent_channels=encoder.hidden_size,
            latent_size=encoder.grid_size,
            decoder_patch_size=patch,
            image_mean=encoder.image_mean if normalised_pixels else [0.0] * 3,
            image_std=encoder.image_std if normalised_pixels else [1.0] * 3,
            noise_tau=noise_tau,
            encoder_fingerprint=encoder.fingerprint(),
            **_decoder_sizes(decoder),
        )
        object.__setattr__(model, "_encoder", encoder)
        return model

    @classmethod
    def from_diffusers(cls, source: Any, **kwargs: Any) -> RepresentationAutoencoder:
        """Read a diffusers `AutoencoderRAE`: a folder, a Hub id, or the model; outputs stay equal.

        Args:
            source: the folder, id or model.
            kwargs: of `AutoencoderRAE.from_pretrained`.

        Raises:
            UserError: for an encoder of SigLIP2, which diffusers cannot build with transformers 5.
        """
        from repagen.models.diffusers_rae import from_diffusers

        return from_diffusers(source, **kwargs)

    def to_diffusers(self) -> Any:
        """Return as a diffusers `AutoencoderRAE`, whose `save_pretrained` writes its folder; outputs stay equal.

        Raises:
            UserError: for what that class cannot express: encoders other than DINOv2 with four registers and MAE,
                several layers, attention heads of another width than 64, a position table that it does not compute.
        """
        from repagen.models.diffusers_rae import to_diffusers

        return to_diffusers(self)

    @property
    def patch_size(self) -> int:
        """See `StandardisedLatents.patch_size`."""
        return self.config.decoder_patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `StandardisedLatents.latent_shape`."""
        return (self.config.latent_channels, self.config.latent_size, self.config.latent_size)

    @property
    def encoder_width(self) -> int:
        """Channels of a latent, all of which come from the encoder."""
        return self.config.latent_channels

    def encoding_facts(self) -> tuple[list[Any], list[torch.Tensor]]:
        """See `StandardisedLatents.encoding_facts`."""
        return [], []

    @apply_forward_hook
    def encode(
        self,
        images: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        grid: tuple[int, int] | None = None,
    ) -> EncoderOutput | tuple[torch.Tensor]:
        """Encode images.

        Args:
            images: (B, 3, H, W) float in [0, 1], resized to what gives the encoder the grid in its own patches.
            return_dict: return an `EncoderOutput` rather than a tuple.
            generator: of the training noise; in eval mode there is none.
            grid: rows and columns (h, w) of the latents, of the proportions of the images. By default `latent_size` of
                both for squares of any side, and one token a patch for others: `latent_grid(H, W)`.

        Returns:
            `.latent` (B, C, h, w), standardised.

        Raises:
            UserError: for other images, or of a size that the encoder does not take.
        """
        if self.training and self.config.noise_tau > 0:
            latents = self.training_latents(images, generator=generator, grid=grid)
        else:
            latents = self._standardise(self.raw_latents(images, grid))
        return EncoderOutput(latent=latents) if return_dict else (latents,)

    def raw_latents(self, images: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Encode images (B, 3, H, W) to latents (B, C, h, w) float32 before noise and standardisation."""
        grid = self._grid_of(images, grid)
        encoder = self._placed_encoder(images.device)
        batches = images.split(1) if self.use_slicing and len(images) > 1 else [images]
        tokens = torch.cat([encoder(batch, grid=grid).tokens for batch in batches])
        return tokens.float().transpose(1, 2).unflatten(2, grid)

    def training_latents(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Encode images for training a decoder: z + sigma * noise, sigma = noise_tau * u per sample (RAE section 3).

        The noise is added before standardisation.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            noise: (B, C, h, w) standard normal; drawn from `generator` if None.
            noise_level: u (B,) in [0, 1]; drawn from `generator` if None.
            generator: of the draws that are not given.
            grid: see `encode`.

        Returns:
            (B, C, h, w) standardised latents.
        """
        raw = self.raw_latents(images, grid)
        device = generator.device if generator is not None else raw.device
        if noise_level is None:
            noise_level = torch.rand(len(raw), generator=generator, device=device)
        if noise is None:
            noise = torch.randn(raw.shape, generator=generator, device=device)
        sigma = self.config.noise_tau * noise_level.to(raw).view(-1, 1, 1, 1)
        return self._standardise(raw + sigma * noise.to(raw))

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents; never touches the encoder.

        Args:
            latents: (B, C, h, w), standardised, of any grid.
            return_dict: return a `DecoderOutput` rather than a tuple.

        Returns:
            `.sample` (B, 3, h * patch_size, w * patch_size), about [0, 1], not clamped.

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
        noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Reconstruct images (B, 3, H, W) in [0, 1]; in training mode through the noise of `training_latents`.

        Args:
            sample: the images.
            return_dict: return a `DecoderOutput` rather than a tuple.
            generator, noise, noise_level: see `training_latents`; `noise` and `noise_level` apply in either mode.
        """
        if noise is not None or noise_level is not None:
            latents = self.training_latents(sample, noise, noise_level, generator)
        else:
            latents = self.encode(sample, return_dict=False, generator=generator)[0]
        return self.decode(latents, return_dict=return_dict)

    def _standardise(self, raw: torch.Tensor) -> torch.Tensor:
        return self.latent_statistics(raw).to(self.dtype)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        raw = self.latent_statistics(latents, undo=True)
        checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
        run = self._gradient_checkpointing_func if checkpointed else None
        grid = (latents.shape[2], latents.shape[3])
        patches = self.decoder(raw.flatten(2).transpose(1, 2).to(self.dtype), run, grid)
        image = unpatchify(patches, grid, self.config.decoder_patch_size).float()
        std = image.new_tensor(self.config.image_std).view(1, 3, 1, 1)
        mean = image.new_tensor(self.config.image_mean).view(1, 3, 1, 1)
        return (image * std + mean).to(latents.dtype)


def _decoder_sizes(decoder: str | Mapping[str, int]) -> dict[str, int]:
    if isinstance(decoder, str):
        if decoder not in DECODER_SIZES:
            raise UserError(
                f"decoder: {decoder!r} is none of {', '.join(DECODER_SIZES)}, nor the four decoder_* sizes"
            )
        return DECODER_SIZES[decoder]
    names = set(DECODER_SIZES["vit-b"])
    if set(decoder) != names:
        raise UserError(
            f"decoder: needs exactly the keys {', '.join(sorted(names))}, got {', '.join(sorted(decoder))}"
        )
    return dict(decoder)


def _check_sizes(**sizes: Any) -> None:
    check_positive(**sizes)
    width, heads = sizes["decoder_hidden_size"], sizes["decoder_num_attention_heads"]
    if width % heads or width % 4:
        raise UserError(f"decoder_hidden_size: {width} must be a multiple of 4 and of its {heads} attention heads")


def _check_pixel_statistics(mean: Any, std: Any) -> None:
    for name, values in (("image_mean", mean), ("image_std", std)):
        numbers = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not numbers or len(values) != 3 or (name == "image_std" and min(values) <= 0):
            raise UserError(
                f"{name}: {values!r} must be three numbers{', all above 0' if name == 'image_std' else ''}"
            )

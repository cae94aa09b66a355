"""The one contract of a frozen vision encoder: images in [0, 1] in, patch tokens on a grid out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from repagen.encoders.backbones import Backbone, TimmBackbone, build_timm, build_transformers
from repagen.encoders.families import FAMILIES, EncoderFamily
from repagen.encoders.files import find_encoder, pixel_statistics, vision_family, weights_file
from repagen.encoders.images import check_images, image_grid
from repagen.encoders.spec import Combination, EncoderSpec, Layers
from repagen.encoders.weights import load_weights, weights_sha256
from repagen.errors import UserError, naming


@dataclass(frozen=True)
class VisionEncoderOutput:
    """What an encoder sees.

    Attributes:
        tokens: (B, N, D) patch tokens, row-major over `grid`, in the encoder's dtype.
        grid: rows and columns (h, w), h * w = N.
        cls: (B, D) class token of the last selected layer, the mean where the family has several, or None.
        attention: of each layer asked for, (B, heads, N, N) float32 between patches alone, rows summing to 1.
    """

    tokens: torch.Tensor
    grid: tuple[int, int]
    cls: torch.Tensor | None
    attention: tuple[torch.Tensor, ...] = ()


class VisionEncoder(nn.Module):
    """A frozen vision encoder.

    Its parameters never require gradients, its forward builds no graph and `train()` leaves it in eval mode.

    Attributes:
        family: name of its row in `repagen.encoders.FAMILIES`.
        hidden_size: width D of a token.
        patch_size: patch side in pixels of the resized image.
        image_size: side in pixels to which square images are resized.
        grid_size: tokens per row and column of those.
        image_mean, image_std: pixel normalisation.
        name_or_path, revision: where the weights come from; the revision is a commit.
    """

    def __init__(self, backbone: Backbone, spec: EncoderSpec) -> None:
        super().__init__()
        family = _family(spec)
        side = spec.image_size if spec.image_size is not None else default_image_size(family, backbone)
        check_image_size(side, backbone.patch_size, f"encoder {spec.name_or_path or spec.family}: image_size")
        backbone.set_image_size(side)
        if spec.combination not in get_args(Combination):
            allowed = ", ".join(get_args(Combination))
            raise UserError(f"encoder.combination: {spec.combination!r} is none of {allowed}")
        self.backbone = backbone
        self.family = family.name
        self.hidden_size = backbone.hidden_size
        self.patch_size = backbone.patch_size
        self.image_size = side
        self.grid_size = side // backbone.patch_size
        self.image_mean = [float(value) for value in spec.image_mean or family.image_mean]
        self.image_std = [float(value) for value in spec.image_std or family.image_std]
        self.layers = spec.layers
        self.combination = spec.combination
        self.norm_affine = spec.norm_affine
        self.name_or_path = spec.name_or_path
        self.revision = spec.revision
        self._indices = layer_indices(spec.layers, backbone.num_layers)
        self._fingerprint: str | None = None
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        image_size: int | None = None,
        grid_size: int | None = None,
        layers: Layers = "last",
        combination: Combination = "last",
        norm_affine: bool = True,
        dtype: torch.dtype | None = None,
        local_files_only: bool = False,
    ) -> VisionEncoder:
        """Load an encoder from a folder or the Hub.

        Args:
            name_or_path: a local folder (Hugging Face or timm layout), a Hub id, or `timm:NAME`.
            revision: branch, tag or commit on the Hub; resolved to a commit before anything is loaded.
            image_size: input side in pixels; by default the family's (see `EncoderFamily.default_side`).
            grid_size: tokens per row and column wanted, in place of `image_size`.
            layers, combination, norm_affine: see `EncoderSpec`.
            dtype: parameter dtype; float32 by default.
            local_files_only: never touch the network.

        Raises:
            UserError: one line for a wrong path, a closed or unreachable repository, an unsupported model type,
                weights that are missing, misshapen or not finite, and sizes or layers that do not fit.
        """
        files = find_encoder(name_or_path, revision, local_files_only)
        family = vision_family(files)
        mean, std = pixel_statistics(files, family)
        nested = files.config.get("vision_config")
        config = nested if isinstance(nested, dict) else files.config
        backbone = load_weights(family, config, files.weights(family), files.name)
        spec = EncoderSpec(
            family=family.name,
            config=config,
            image_size=grid_size * backbone.patch_size if grid_size is not None else image_size,
            layers=layers,
            combination=combination,
            norm_affine=norm_affine,
            image_mean=mean,
            image_std=std,
            name_or_path=files.repo_id or files.name,
            revision=files.revision,
        )
        return cls(backbone, spec).to(dtype or torch.float32)

    @classmethod
    def from_spec(cls, spec: EncoderSpec, folder: str | os.PathLike[str]) -> VisionEncoder:
        """Build the encoder of a spec with the weights that `save_pretrained` wrote to a folder.

        Raises:
            UserError: for weights that are missing, misshapen or not finite.
        """
        weights = weights_file(Path(folder), spec.name_or_path or spec.family)
        return cls(load_weights(_family(spec), spec.config, weights, os.fspath(folder)), spec)

    @classmethod
    def from_config(cls, spec: EncoderSpec | Mapping[str, Any]) -> VisionEncoder:
        """Build an encoder with random weights; never downloads.

        Args:
            spec: an `EncoderSpec` or a mapping with its fields.
        """
        if not isinstance(spec, EncoderSpec):
            spec = EncoderSpec.from_mapping(spec)
        return cls(build_backbone(spec), spec)

    def spec(self) -> EncoderSpec:
        """Return the description this encoder can be rebuilt from."""
        return EncoderSpec(
            family=self.family,
            config=self.backbone.architecture,
            image_size=self.image_size,
            layers=self.layers if isinstance(self.layers, str | int) else list(self.layers),
            combination=self.combination,
            norm_affine=self.norm_affine,
            image_mean=self.image_mean,
            image_std=self.image_std,
            name_or_path=self.name_or_path,
            revision=self.revision,
        )

    def reading(self, **changes: Any) -> VisionEncoder:
        """Return an encoder over the same weights that is read in another way.

        Args:
            changes: fields of `EncoderSpec` other than family, config and, for timm, image_size. This encoder is left
                as it is.
        """
        return VisionEncoder(self.backbone, dataclasses.replace(self.spec(), **changes))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stay in eval mode, whatever `mode` says."""
        super().train(False)
        return self

    def grid_of(self, size: Sequence[int], image_size: int, name: str = "images") -> tuple[int, int]:
        """Return the grid of images among squares that give `grid_size`: a token is of as many pixels in all of them.

        Args:
            size: height and width of the images in pixels.
            image_size: side of the squares in pixels.
            name: what the user gave the size as, for messages.

        Raises:
            UserError: for a side that is no whole number of tokens, or a grid that the network does not take.
        """
        grid = image_grid(size, image_size, self.grid_size, name, "the encoder's")
        with naming({"encoder: ": f"{name}: "}):
            self._require_grid(grid)
        return grid

    @torch.no_grad()
    def forward(
        self, images: torch.Tensor, attention_layers: Sequence[int] = (), grid: tuple[int, int] | None = None
    ) -> VisionEncoderOutput:
        """Encode images.

        Args:
            images: (B, 3, H, W) float in [0, 1]; resized to the grid's rows and columns times `patch_size` (bicubic,
                no antialiasing, as RAE does).
            attention_layers: block indices (0-based, negative from the end) whose attention is wanted too, in this
                order. The network then attends by explicit matrices, which takes memory for every block.
            grid: rows and columns of tokens wanted, of the proportions of the images; `grid_size` of both by default.
                The network's positions are interpolated as its family does it.

        Returns:
            tokens (B, N, D) in the encoder's dtype, the grid, the class token, and the attention asked for.

        Raises:
            UserError: for anything but a batch of three-channel float images of the proportions of the grid, a grid
                that the network does not take, or attention of layers that are not there or of a network that does
                not tell it.
        """
        if not attention_layers:
            return self._encode(images, grid)
        wanted = layer_indices(attention_layers, self.backbone.num_layers, "attention_layers")
        with self.backbone.recording_attention(wanted) as maps:
            # Beyond the blocks that are read, timm stops.
            output = self._encode(images, grid, last=wanted[-1])
        asked = (layer % self.backbone.num_layers for layer in attention_layers)
        return dataclasses.replace(output, attention=tuple(self._patch_attention(maps[layer]) for layer in asked))

    @torch.no_grad()
    def layer_tokens(self, images: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """Patch tokens (B, N, D) of several blocks, each after the final norm, by one pass.

        Args:
            images: (B, 3, H, H) float in [0, 1]; as in `forward`.
            layers: different block indices (0-based, negative from the end).

        Returns:
            The tokens of the blocks in ascending order.

        Raises:
            UserError: as `forward`, and for layers that are not there.
        """
        indices = layer_indices(layers, self.backbone.num_layers)
        return self._patches(self.backbone.states(self._pixels(images), indices))

    def _patches(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Patch tokens, after the final norm, of states (B, prefix + N, D)."""
        return [self._normalise(state[:, self.backbone.prefix_tokens :]) for state in states]

    def _encode(self, images: torch.Tensor, grid: tuple[int, int] | None, last: int = 0) -> VisionEncoderOutput:
        """Read the selected blocks of a pass that runs up to block `last` at least."""
        indices = self._indices if last <= self._indices[-1] else [*self._indices, last]
        states = self.backbone.states(self._pixels(images, grid), indices)[: len(self._indices)]
        patches = self._combine(self._patches(states))
        cls_tokens = self._normalise(states[-1][:, : self.backbone.cls_tokens], patches=False)
        cls = cls_tokens.mean(dim=1) if self.backbone.cls_tokens else None
        return VisionEncoderOutput(patches, grid or (self.grid_size, self.grid_size), cls)

    def _patch_attention(self, attention: torch.Tensor) -> torch.Tensor:
        """Leave the prefix out and renormalise: the softmax of the patches' own logits."""
        prefix = self.backbone.prefix_tokens
        attention = attention[..., prefix:, prefix:].float()
        return attention / attention.sum(dim=-1, keepdim=True)

    def fingerprint(self) -> str:
        """Return a sha256 over the weights, the same for float32 and bfloat16 copies and for any tensor names.

        Two encoders with equal fingerprints, image sizes and readings give the same tokens.
        """
        if self._fingerprint is None:
            self._fingerprint = weights_sha256(self.backbone)
        return self._fingerprint

    def save_pretrained(self, folder: str | os.PathLike[str], variant: str | None = None) -> None:
        """Write config, weights and pixel normalisation in the layout of transformers (or timm).

        Args:
            folder: created if it does not exist; `from_pretrained` reads it back.
            variant: inserted in the name of the weights file.
        """
        import json

        path = Path(folder)
        self.backbone.save(path, variant)
        if not isinstance(self.backbone, TimmBackbone):
            content = {"image_mean": self.image_mean, "image_std": self.image_std}
            (path / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")

    def _pixels(self, images: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Normalised pixels (B, 3, rows * patch_size, columns * patch_size); nothing is squashed."""
        grid = grid or (self.grid_size, self.grid_size)
        check_images(images, square=grid[0] == grid[1])
        height, width = images.shape[-2:]
        if height * grid[1] != width * grid[0]:
            raise UserError(f"images: {height}x{width} px are not of the proportions of the grid {grid[0]}x{grid[1]}")
        self._require_grid(grid)
        pixels, size = images.float(), (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if (height, width) != size:
            pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        mean = pixels.new_tensor(self.image_mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.image_std).view(1, 3, 1, 1)
        return ((pixels - mean) / std).to(self.dtype)

    def _require_grid(self, grid: tuple[int, int]) -> None:
        FAMILIES[self.family].require_grid(self.backbone.architecture, grid, self.grid_size)

    def _normalise(self, state: torch.Tensor, patches: bool = True) -> torch.Tensor:
        norm = self.backbone.final_norm
        if self.norm_affine:
            skipped = norm is None or (patches and not self.backbone.normalises_patches)
            return state if skipped else norm(state)  # type: ignore[misc]
        if norm is None or isinstance(norm, nn.LayerNorm):
            return F.layer_norm(state, (self.hidden_size,), eps=1e-6 if norm is None else norm.eps)
        # Another norm (AIMv2's RMSNorm): the same computation with a weight of one.
        return functional_call(norm, {"weight": torch.ones_like(norm.weight)}, state)  # type: ignore[arg-type]

    def _combine(self, layers: list[torch.Tensor]) -> torch.Tensor:
        if self.combination == "last":
            return layers[-1]
        total = torch.stack(layers).sum(0)
        if self.combination == "sum":
            return total
        mean = total / len(layers)
        return mean if self.combination == "mean" else mean + layers[-1].mean(dim=1, keepdim=True)


def build_backbone(spec: EncoderSpec) -> Backbone:
    """Build the network of a spec with random weights."""
    family, where = _family(spec), "encoder.config"
    if family.name == "timm":
        return build_timm(spec.config, where)
    return build_transformers(family, spec.config, where)


def default_image_size(family: EncoderFamily, backbone: Backbone) -> int:
    """Return the input side in pixels used when none is asked for."""
    sixteen = 16 * backbone.patch_size
    large = backbone.native_side >= 14 * backbone.patch_size
    return sixteen if family.default_side == "grid16" and large else backbone.native_side


def layer_indices(layers: Layers, count: int, where: str = "layers") -> list[int]:
    """Return ascending 0-based block indices.

    Raises:
        UserError: for an index outside the network, a repeated or an empty choice.
    """
    if layers == "last":
        return [count - 1]
    asked = [layers] if isinstance(layers, int) else list(layers)
    indices = sorted({index + count if isinstance(index, int) and index < 0 else index for index in asked})
    valid = all(isinstance(index, int) and 0 <= index < count for index in indices)
    if not valid or len(indices) != len(asked) or not indices:
        raise UserError(f"encoder.{where}: {layers!r} must be 'last' or different block indices in [0, {count})")
    return indices


def check_image_size(side: Any, patch_size: int, where: str) -> None:
    """Refuse a side that is no positive multiple of the patch side, both in pixels."""
    if not isinstance(side, int) or side <= 0 or side % patch_size:
        raise UserError(f"{where}: {side!r} px is no positive multiple of the patch side {patch_size} px")


def _family(spec: EncoderSpec) -> EncoderFamily:
    if spec.family not in FAMILIES:
        raise UserError(f"encoder.family: {spec.family!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[spec.family]

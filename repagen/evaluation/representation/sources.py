"""Where token features come from: the blocks of a generator at chosen times, or the layers of an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from repagen.alignment.plugin import Record, blocks_of, listen
from repagen.encoders import VisionEncoder
from repagen.errors import UserError, naming
from repagen.flow.path import interpolate
from repagen.models.identity import describe_autoencoder, describe_encoder, describe_transformer
from repagen.models.latents import images_to_latents, latent_shape, require_independent_latents
from repagen.models.modes import in_eval_mode
from repagen.pipelines.guided_prediction import class_token_dim, is_discrete
from repagen.randomness import generator_for, normal_per_sample

GivenLabel = Literal["null", "own", "none"]
"""The class a generator is told: the null label, the image's own, or none because it has no classes."""


@dataclass(frozen=True)
class FeatureSlice:
    """One place at which features are read.

    Attributes:
        block: a generator's block, counted from 1 as alignment counts them; or an encoder's layer, counted from 0 as
            `VisionEncoder` counts them.
        timestep: t in [0, 1] (0 = data, 1 = noise) of a generator's input; None for an encoder.
    """

    block: int
    timestep: float | None = None

    def __str__(self) -> str:
        return f"layer {self.block}" if self.timestep is None else f"block {self.block}, t={self.timestep:g}"


class FeatureSource(Protocol):
    """Images => tokens (B, N, D) of several slices.

    Attributes:
        slices: all that it offers.
        grid: rows and columns of the tokens.
    """

    slices: list[FeatureSlice]
    grid: tuple[int, int]

    @property
    def name(self) -> str:
        """What it is, for messages."""

    @property
    def last(self) -> Sequence[FeatureSlice]:
        """Those of the network's last block or layer."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def passes(self, slices: Sequence[FeatureSlice]) -> list[list[FeatureSlice]]:
        """Group slices by the passes over the images that they take."""

    def tokens(
        self, slices: Sequence[FeatureSlice], images: torch.Tensor, labels: torch.Tensor, indices: Sequence[int]
    ) -> list[torch.Tensor]:
        """Tokens (B, N, D) of the slices of one pass.

        Args:
            slices: of one of `passes`.
            images: (B, 3, H, H) float in [0, 1].
            labels: (B,) int64.
            indices: places of the images in their dataset, which key all randomness.
        """

    def describe(self) -> dict[str, Any]:
        """All that the tokens of an image depend on but the slice; JSON-able. Names stand under "name"."""


class GeneratorSource:
    """The outputs of a generator's blocks on noised images.

    An image becomes a latent x by the pipeline's own autoencoder and x_t = (1 - t) x + t noise, or, for a model of
    integer steps, what its own scheduler makes of x at the step nearest to 1000 t. The noise is a function of (seed,
    index of the image, draw), the same at every t. Read is the output of `blocks` at the image's own tokens; class,
    time and context tokens are left out. Model and autoencoder are in eval mode while they are read: no
    dropout or noise of a training gets in.

    Args:
        pipeline: the generator with its autoencoder and scheduler, on its device.
        blocks: numbers counted from 1, as in alignment; None for all. Those of a second, wide part (`head_blocks` of
            DiT^DH, DDT and RAEv2) are not among them; of a looped generator's, the last loop counts.
        timesteps: t in [0, 1].
        seed: of the noise.
        null_label: give every image the null label, so that the model is not told what it shows (REPA). False gives
            the image's own label, for comparison.
        draw: number of the noise, for several independent ones of one image.

    Raises:
        UserError: a block that the model does not have, a time outside [0, 1], either given twice; a model without a
            null label; a model that denoises a class token; latents that depend on their batch.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        blocks: Sequence[int] | None = None,
        timesteps: Sequence[float] = (0.5,),
        seed: int = 0,
        null_label: bool = True,
        draw: int = 0,
    ) -> None:
        self.pipeline = pipeline
        self.model = pipeline.transformer
        self.seed = seed
        self.draw = draw
        depth = len(self.model.blocks)
        numbers = sorted(set(range(1, depth + 1) if blocks is None else blocks))
        times = sorted({float(t) for t in timesteps})
        if not numbers or not times or (blocks is not None and len(numbers) != len(blocks)):
            raise UserError(f"blocks: {_listed(blocks)}: give different blocks from 1 to {depth}, or all")
        wrong = [number for number in numbers if not 1 <= number <= depth]
        if wrong:
            raise UserError(f"blocks: {wrong[0]}: the model has blocks 1 to {depth}; give some of them, or all")
        if len(times) != len(timesteps) or not 0 <= times[0] <= times[-1] <= 1:
            raise UserError(f"timesteps: {_listed(timesteps)}: give different times in [0, 1]; 0 = data, 1 = noise")
        self.slices = [FeatureSlice(number, t) for t in times for number in numbers]
        self.label = self._label(null_label)
        self.grid = self.model.token_grid
        require_independent_latents(pipeline.vae, "pipeline")
        if class_token_dim(self.model):
            raise UserError(
                "pipeline: it denoises an encoder's class token beside the latent, which would tell it what the image "
                "shows; read-outs are for generators without class_token_dim"
            )

    def _label(self, null_label: bool) -> GivenLabel:
        num_classes = self.model.config.num_classes
        if num_classes == 0:
            return "none"
        if null_label and self.model.config.class_dropout_prob == 0:
            raise UserError(
                "pipeline: it has no null label (class_dropout_prob is 0), and a class would tell it what the image "
                "shows; take a model trained with class_dropout_prob above 0, or null_label=False from Python"
            )
        return "null" if null_label else "own"

    @property
    def name(self) -> str:
        """Where the pipeline was loaded from."""
        return self.pipeline.config.get("_name_or_path") or "the generator"

    @property
    def last(self) -> Sequence[FeatureSlice]:
        """The slices of the model's last block."""
        return [place for place in self.slices if place.block == len(self.model.blocks)]

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return self.model.device

    def passes(self, slices: Sequence[FeatureSlice]) -> list[list[FeatureSlice]]:
        """One pass a time."""
        times = dict.fromkeys(place.timestep for place in slices)
        return [[place for place in slices if place.timestep == t] for t in times]

    @torch.no_grad()
    def tokens(
        self, slices: Sequence[FeatureSlice], images: torch.Tensor, labels: torch.Tensor, indices: Sequence[int]
    ) -> list[torch.Tensor]:
        """See `FeatureSource.tokens`."""
        t = slices[0].timestep
        assert t is not None
        with in_eval_mode(self.model, self.pipeline.vae), self._recording(slices) as record:
            noisy, times = self._noisy(images, indices, t)
            self.model(
                hidden_states=noisy.to(self.model.dtype),
                timestep=times,
                class_labels=self._class_labels(labels).to(noisy.device) if self.label != "none" else None,
                return_dict=False,
            )
            return [record.values[place.block][:, : record.num_tokens] for place in slices]

    @contextmanager
    def _recording(self, slices: Sequence[FeatureSlice]) -> Iterator[Record]:
        record = Record()
        record.grid = self.grid
        blocks = blocks_of(self.model, [place.block for place in slices], "slices.{}.block".format)
        handles = [listen(block, record, number) for number, block in blocks.items()]
        try:
            with record.recording():
                yield record
        finally:
            for handle in handles:
                if handle is not None:
                    handle.remove()

    def _noisy(self, images: torch.Tensor, indices: Sequence[int], t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Noised latents (B, C, h, w) float32, and the time as the model takes it, (B,)."""
        device = self.device

        def generators(purpose: str) -> list[torch.Generator]:
            return [generator_for(self.seed, purpose, index, self.draw) for index in indices]

        posterior = generators("representation posterior")
        with naming({"image_size: ": "data.image_size: "}):
            latent_shape(self.pipeline.vae, images.shape[-1])  # an encoder would resize other images in silence
        latents = images_to_latents(self.pipeline.vae, images.to(device), generator=posterior).float()
        expected = tuple(side * self.model.config.patch_size for side in self.grid)
        if tuple(latents.shape[2:]) != expected:
            raise UserError(
                f"data.image_size: images of {images.shape[-1]} px become latents of {tuple(latents.shape[2:])}, the "
                f"model takes {expected}; set it to the size that the model was trained at"
            )
        noise = normal_per_sample(generators("representation noise"), latents.shape[1:]).to(device)
        if not is_discrete(self.model):
            times = torch.full((len(latents),), t, device=device)
            return interpolate(latents, noise, times), times
        steps = torch.full((len(latents),), self._step(t), device=device)
        return self.pipeline.scheduler.add_noise(latents, noise, steps), steps

    def _step(self, t: float) -> int:
        """The integer step of a time: pipelines count t as step / 1000."""
        count = self.pipeline.scheduler.config.num_train_timesteps
        return min(round(t * count), count - 1)

    def _class_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.full_like(labels, self.model.config.num_classes) if self.label == "null" else labels

    def describe(self) -> dict[str, Any]:
        """See `FeatureSource.describe`."""
        schedule = {}
        if is_discrete(self.model):
            scheduler = self.pipeline.scheduler
            known = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas")
            schedule = {"noise_schedule": {key: scheduler.config.get(key) for key in known}}
        return {
            "kind": "generator",
            "name": self.pipeline.config.get("_name_or_path"),
            **describe_transformer(self.model),
            "autoencoder": describe_autoencoder(self.pipeline.vae),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "label": self.label,
            "seed": self.seed,
            "draw": self.draw,
            **schedule,
        }


class EncoderSource:
    """The patch tokens of an encoder's layers, each after the final norm.

    Args:
        encoder: frozen, on its device; resizes images itself.
        layers: counted from 0, negative from the end; None for all.

    Raises:
        UserError: a layer that the encoder does not have, or one given twice.
    """

    def __init__(self, encoder: VisionEncoder, layers: Sequence[int] | None = None) -> None:
        self.encoder = encoder
        count = encoder.backbone.num_layers
        asked = range(count) if layers is None else layers
        wrong = [number for number in asked if not -count <= number < count]
        if wrong:
            raise UserError(
                f"layers: {wrong[0]}: the encoder has layers 0 to {count - 1}, or {-count} to -1 counted from the "
                "end; give some of them, or all"
            )
        numbers = sorted({number % count for number in asked})
        if not numbers or len(numbers) != len(asked):
            raise UserError(f"layers: {_listed(layers)}: give different layers from 0 to {count - 1}, or all")
        self.slices = [FeatureSlice(number) for number in numbers]
        self.grid = (encoder.grid_size, encoder.grid_size)

    @property
    def name(self) -> str:
        """Where the encoder was loaded from."""
        return str(self.encoder.name_or_path or "the encoder")

    @property
    def last(self) -> Sequence[FeatureSlice]:
        """The last layer, where it is among the slices."""
        return [place for place in self.slices if place.block == self.encoder.backbone.num_layers - 1]

    @property
    def device(self) -> torch.device:
        """That of the encoder."""
        return self.encoder.device

    def passes(self, slices: Sequence[FeatureSlice]) -> list[list[FeatureSlice]]:
        """One pass for all layers."""
        return [list(slices)] if slices else []

    def tokens(
        self, slices: Sequence[FeatureSlice], images: torch.Tensor, labels: torch.Tensor, indices: Sequence[int]
    ) -> list[torch.Tensor]:
        """See `FeatureSource.tokens`; slices in ascending order."""
        with in_eval_mode(self.encoder):
            return self.encoder.layer_tokens(images.to(self.encoder.device), [place.block for place in slices])

    def describe(self) -> dict[str, Any]:
        """See `FeatureSource.describe`."""
        described = describe_encoder(self.encoder)
        ours = {key: value for key, value in described.items() if key not in ("layers", "combination")}
        return {"kind": "encoder", **ours, "dtype": str(self.encoder.dtype).removeprefix("torch.")}


def _listed(values: Sequence[Any] | None) -> str:
    return " ".join(f"{value:g}" for value in values or ()) or "none"

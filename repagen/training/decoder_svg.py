"""Training of SVG's autoencoder (arXiv 2510.15301): residual encoder, mask token and convolutional decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repagen.errors import UserError, naming
from repagen.models.autoencoder_svg import SVGAutoencoder, channel_moments, channel_sums
from repagen.models.identity import describe_encoder
from repagen.randomness import derived_seed, uniform_per_sample
from repagen.training.decoder_config import DecoderConfig
from repagen.training.decoder_kind import ENCODER_KEYS, AutoencoderKind, Inputs
from repagen.training.frozen import encoder_source
from repagen.training.latent_identity import open_autoencoder
from repagen.training.latent_matching import calibrate_to_dataset
from repagen.training.latent_statistics import set_latent_statistics
from repagen.training.run import Batch, Run


class SVGKind(AutoencoderKind):
    """Trains everything but the frozen encoder.

    The scalars that match the residual to the encoder's features are those of the whole global batch, taken in a pass
    without gradients before; the published code takes those of whatever a GPU holds. As there, they are constants to
    the gradient. The running ones move once per optimiser step.

    Masks are drawn per sample. Dropout is drawn per group of `dropout_samples` consecutive samples, the same in both
    passes.
    """

    def __init__(self, autoencoder: SVGAutoencoder, config: DecoderConfig, run: Run) -> None:
        super().__init__(autoencoder, config, run)
        self._statistics = autoencoder.latents_mean.clone(), autoencoder.latents_std.clone()
        autoencoder.set_statistics(None)
        self._residual = bool(autoencoder.config.use_residual)
        self._drops = self._residual and autoencoder.config.residual_dropout > 0
        group = config.autoencoder.svg.dropout_samples
        if self._drops and run.plan.micro_size % group:
            raise UserError(
                f"autoencoder.svg.dropout_samples: {group} samples share a dropout, but a micro-batch has "
                f"{run.plan.micro_size}; set it to a divisor of micro_batch_size"
            )

    @classmethod
    def open(cls, config: DecoderConfig, run: Run) -> SVGKind:
        """Load the encoder and make the parts that are trained, or load the pretrained autoencoder.

        Raises:
            UserError: something is not there or does not fit.
        """
        settings, image_size = config.autoencoder, config.data.image_size
        if settings.pretrained is not None:
            autoencoder = open_autoencoder(settings.pretrained, option="autoencoder.pretrained")
            if not isinstance(autoencoder, SVGAutoencoder):
                raise UserError(
                    f"autoencoder.pretrained: {settings.pretrained} is a {type(autoencoder).__name__}; allowed: an "
                    "SVGAutoencoder, or another autoencoder.kind"
                )
        else:
            assert settings.encoder is not None, "the config's validate saw to it"
            sizes = asdict(settings.svg)
            del sizes["dropout_samples"]
            source = encoder_source(settings.encoder)
            with naming({**ENCODER_KEYS, **{f"{name}:": f"autoencoder.svg.{name}:" for name in sizes}}):
                autoencoder = SVGAutoencoder.from_encoder(source, image_size, revision=settings.revision, **sizes)
        if autoencoder.image_size != image_size:
            raise UserError(
                f"data.image_size: {image_size} px given, but the autoencoder encodes {autoencoder.image_size} px; "
                f"set data.image_size={autoencoder.image_size}"
            )
        return cls(autoencoder.eval(), config, run)

    @property
    def last_weight(self) -> nn.Parameter:
        """The decoder's last convolution."""
        return self.autoencoder.decoder.conv_out.weight

    def facts(self) -> dict[str, Any]:
        """The frozen encoder's weights."""
        return {"encoder": describe_encoder(self.autoencoder.encoder)["weights"]}

    @torch.no_grad()
    def prepare(self, batches: Sequence[Batch]) -> list[Batch]:
        """Add the encoder's features, the masks, and the matching scalars of the global batch."""
        prepared = []
        for batch in batches:
            with self.run.autocast():
                features = self.autoencoder.encoder_features(batch["image"], self._grid(batch["image"]))
            inputs = {"images": batch["image"], "features": features}
            if self._residual:
                draws = uniform_per_sample(self.run.generators("residual mask", batch))
                inputs["masks"] = draws < self.autoencoder.config.mask_probability
                inputs["positions"] = batch["position"]
            prepared.append({**batch, "inputs": inputs})
        if self._residual:
            scalars = self._matching_scalars([batch["inputs"] for batch in prepared])
            self.autoencoder.distribution_matching.update(scalars)
            for batch in prepared:
                batch["inputs"]["scalars"] = scalars
        return prepared

    def reconstruct(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode, mask, match, decode; there is no penalty."""
        training_latents, scalars = self.autoencoder.training_latents, inputs.get("scalars")
        with self._dropout():
            latents = [
                training_latents(
                    group["images"], group.get("masks"), group["features"], scalars, grid=self._grid(group["images"])
                )
                for group in self._groups(inputs)
            ]
        return self.autoencoder.decode(torch.cat(latents)).sample.float(), {}

    @torch.no_grad()
    def preview(self, images: Tensor) -> Tensor:
        """Reconstruct without masks and dropout, matched by the running scalars."""
        return self.autoencoder.decode(self.autoencoder.raw_latents(images, grid=self._grid(images))).sample.float()

    def finish(self) -> None:
        """Take matching scalars and statistics per channel from the data, in one pass, with the weights as they are.

        The scalars of training lag behind the EMA weights, so they are taken anew whatever `statistics` says; without
        it the statistics stay those that the autoencoder came with.
        """
        self.autoencoder.latents_mean.copy_(self._statistics[0])
        self.autoencoder.latents_std.copy_(self._statistics[1])
        matched = self._residual and self.autoencoder.config.matching == "running"
        if not (matched or self.config.statistics):
            return
        found = calibrate_to_dataset(self.autoencoder, **self.statistics_arguments())
        if self.config.statistics:
            set_latent_statistics(self.autoencoder, found)

    def save(self, folder: Path) -> None:
        """Write the trained parts, statistics, and the encoder or where it is."""
        self.autoencoder.save_pretrained(folder, include_encoder=self.config.autoencoder.include_encoder)

    def _matching_scalars(self, parts: Sequence[Inputs]) -> Tensor:
        """Return the scalars (4,) float32 of the global batch, after masks."""
        sums = torch.stack([channel_sums(self._masked_tokens(inputs)) for inputs in parts]).sum(0)
        if self.run.plan.processes > 1:
            sums = self.run.accelerator.reduce(sums, "sum")
        return self.autoencoder.distribution_matching.of_channels(
            *channel_moments(sums), self.autoencoder.encoder_width
        ).float()

    def _masked_tokens(self, inputs: Inputs) -> Tensor:
        """Features and masked residuals, before they are matched: (B, C, N) float32."""
        with self.run.autocast(), self._dropout():
            residual_encoder, grid = self.autoencoder.residual_encoder, self._grid(inputs["images"])
            residual = torch.cat([residual_encoder(group["images"], grid) for group in self._groups(inputs)])
        masked = torch.where(inputs["masks"].view(-1, 1, 1), self.autoencoder.mask_token.to(residual.dtype), residual)
        return torch.cat([inputs["features"], masked.float()], dim=1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return self.shape_of(images)[1:]

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Switch the residual encoder's dropout on; the autoencoder itself is always in eval mode."""
        if self._drops:
            self.autoencoder.residual_encoder.train()
        try:
            yield
        finally:
            self.autoencoder.eval()

    def _groups(self, inputs: Inputs) -> Iterator[Inputs]:
        """Cut a micro-batch into the groups that share a dropout, seeding each as it is taken."""
        if not self._drops:
            yield inputs
            return
        size = self.config.autoencoder.svg.dropout_samples
        for start, position in enumerate(inputs["positions"].tolist()):
            if start % size == 0:
                torch.manual_seed(derived_seed(self.config.seed, "residual dropout", position))
                yield {name: inputs[name][start : start + size] for name in ("images", "features", "masks")}

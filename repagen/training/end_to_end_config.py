"""The configuration of end-to-end training (REPA-E), `repagen.training.end_to_end`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from repagen.config import require
from repagen.errors import UserError
from repagen.training.decoder_config import DecoderConfig, KLConfig, TrainedAutoencoderConfig
from repagen.training.discriminator import AdversarialConfig
from repagen.training.generator_config import GeneratorConfig
from repagen.training.optimizer import OptimizerConfig
from repagen.training.perceptual import LpipsConfig


@dataclass
class EndToEndAutoencoderConfig:
    """How the autoencoder is trained beside the generator.

    Attributes:
        alignment_weight: of the generator's alignment loss, carried back to the autoencoder; REPA-E 1.5.
        l1_weight: of the mean absolute error of pixels in [0, 1]; 2: in [-1, 1], as REPA-E takes it.
        kl_weight: of the posterior's divergence from N(0, I), summed over the elements of a latent.
        lpips, adversarial: as in decoder training.
        optimizer: of encoder and decoder; the discriminator has its own in `adversarial`.
        norm_momentum, norm_epsilon: of the latents' batch norm.
    """

    alignment_weight: float = 1.5
    l1_weight: float = 2.0
    kl_weight: float = 1e-6
    lpips: LpipsConfig = field(default_factory=LpipsConfig)
    adversarial: AdversarialConfig = field(
        default_factory=lambda: AdversarialConfig(
            weight=0.1, adaptive=False, discriminator="patch", discriminator_start_step=0, start_step=0
        )
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    norm_momentum: float = 0.1
    norm_epsilon: float = 1e-4

    def validate(self) -> None:
        """Check the ranges."""
        require(self.alignment_weight >= 0, "alignment_weight", self.alignment_weight, "at least 0")
        require(self.l1_weight > 0, "l1_weight", self.l1_weight, "above 0")
        require(self.kl_weight >= 0, "kl_weight", self.kl_weight, "at least 0")
        require(0 < self.norm_momentum <= 1, "norm_momentum", self.norm_momentum, "above 0 and at most 1")
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "above 0")


@dataclass(kw_only=True)
class EndToEndConfig(GeneratorConfig):
    """Everything about one training of a generator together with its autoencoder.

    Attributes:
        autoencoder: the `AutoencoderKL` to begin with.
        autoencoder_training: how it is trained.
        alignment: its `targets` are what trains both; other terms are not for end-to-end training.
    """

    autoencoder_training: EndToEndAutoencoderConfig = field(default_factory=EndToEndAutoencoderConfig)

    def validate(self) -> None:
        """Check that there is something that both are trained by."""
        super().validate()
        require(self.data.kind != "latents", "data.kind", self.data.kind, "a kind of images; the latents change")
        if not self.alignment.targets:
            raise UserError("alignment.targets: end-to-end training needs one; it is what trains the autoencoder too")
        others = [name for name in self.alignment.schedules if name != "alignment"]
        if others or self.alignment.changes_over_time:
            key = others[0] if others else "schedule"
            raise UserError(f"alignment.{key}: end-to-end training takes targets with a constant weight only; drop it")

    def of_autoencoder(self) -> DecoderConfig:
        """The autoencoder's part, as the configuration of a `DecoderStep`."""
        part = self.autoencoder_training
        return DecoderConfig(
            output_dir=self.output_dir,
            seed=self.seed,
            max_steps=self.max_steps,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            data=replace(self.data),
            autoencoder=TrainedAutoencoderConfig(
                kind="kl", pretrained=self.autoencoder.path, kl=KLConfig(weight=part.kl_weight)
            ),
            l1_weight=part.l1_weight,
            lpips=part.lpips,
            adversarial=part.adversarial,
            optimizer=part.optimizer,
        )

"""The configuration of generator training, `repagen.training.generator`."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from repagen.alignment import AlignmentSchedule
from repagen.config import build_value, nearest, require
from repagen.data import DataConfig
from repagen.errors import UserError
from repagen.flow.distillation import student_loss_weight
from repagen.flow.time import TimeShift
from repagen.training.ema import EmaConfig
from repagen.training.evaluation_config import EvaluationConfig
from repagen.training.optimizer import OptimizerConfig
from repagen.training.run_config import RunConfig

# Constructor arguments that follow from the data, the autoencoder or another key.
_DERIVED_ARGUMENTS = {
    "sample_size": "it follows from the latent",
    "in_channels": "it follows from the latent",
    "num_classes": "it follows from the dataset",
    "patch_size": "set transformer.patch_size",
    "prediction_type": "set transformer.prediction",
    "class_dropout_prob": "set label_dropout",
    "time_direction": "new models count as the library does",
    "class_token_dim": "set alignment.class_token",
    "text_dim": "it follows from the text encoder",
    "text_dropout_prob": "set text.dropout",
}


@dataclass
class AutoencoderConfig:
    """The frozen autoencoder whose latents are generated.

    Attributes:
        path: folder or Hub id of a `RepresentationAutoencoder`, or of diffusers' `AutoencoderKL` or `AutoencoderRAE`.
        subfolder: where it stands in there, for example `vae` of a pipeline.
        revision: branch, tag or commit on the Hub.
    """

    path: str
    subfolder: str | None = None
    revision: str | None = None


Architecture = Literal["sit", "dit", "lightningdit", "ditdh", "raev2", "ddt", "elt"]
ARCHITECTURES: dict[Architecture, str] = {
    "sit": "SiTTransformer2DModel",
    "dit": "DDPMDiTTransformer2DModel",
    "lightningdit": "LightningDiTTransformer2DModel",
    "ditdh": "DiTDHTransformer2DModel",
    "raev2": "RAEv2Transformer2DModel",
    "ddt": "DDTTransformer2DModel",
    "elt": "ELTTransformer2DModel",
}
"""The networks, by their public class names."""


@dataclass
class TransformerConfig:
    """The network that is trained.

    Attributes:
        architecture: one of `ARCHITECTURES`; None: that of `pretrained`, or `ditdh`.
        size: published width, depth and heads, as the class has them; None: those of `pretrained`, or `S`.
        patch_size: side of a patch of the latent; None: that of `pretrained`, or 1.
        prediction: what the network puts out; None: that of `pretrained`, or the class's own. For `sample` the loss is
            that of the velocity (x_t - x_hat) / max(t, 0.05), in prediction and target alike (JiT; RAEv2). `epsilon`
            belongs to `dit`, whose discrete steps and losses are DDPM's.
        overrides: further constructor arguments, or other values for those of the size.
        pretrained: folder or Hub id of a pipeline or a transformer to go on from, such as `repagen convert` writes. It
            keeps its sizes, prediction and time direction; what is set above must agree with them.
        revision: branch, tag or commit of it on the Hub.
        new_classes: where the dataset has other classes than `pretrained`, draw their embeddings anew; the null class
            and all other weights are kept.
    """

    architecture: Architecture | None = None
    size: str | None = None
    patch_size: int | None = None
    prediction: Literal["velocity", "sample", "epsilon"] | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    revision: str | None = None
    new_classes: bool = False

    @property
    def model_class(self) -> Any:
        """The class of a new network."""
        import repagen

        return getattr(repagen, ARCHITECTURES[self.architecture or "ditdh"])

    def validate(self) -> None:
        """Check the values against the class; those that a pretrained network has are compared when it is loaded."""
        require(self.patch_size is None or self.patch_size >= 1, "patch_size", self.patch_size, "at least 1")
        if self.pretrained is None:
            for key in ("revision", "new_classes"):
                require(not getattr(self, key), key, getattr(self, key), "left out without transformer.pretrained")
        elif self.architecture is None:
            require(self.size is None, "size", self.size, "left out, or given together with transformer.architecture")
            return
        if self.size is not None or self.pretrained is None:
            try:
                self.model_class.config_for_size(self.size or "S")
            except UserError as error:
                raise UserError(f"size: {error}") from None
        if self.prediction is not None:
            epsilon = self.prediction == "epsilon"
            allowed = "epsilon" if self.model_class.discrete_time else "velocity or sample (epsilon is DiT's)"
            require(epsilon == self.model_class.discrete_time, "prediction", self.prediction, allowed)
        self._validate_overrides()

    def _validate_overrides(self) -> None:
        constructor = inspect.unwrap(self.model_class.__init__)
        kinds = typing.get_type_hints(constructor)
        names = [name for name in inspect.signature(constructor).parameters if name != "self"]
        for name, value in self.overrides.items():
            if name in _DERIVED_ARGUMENTS:
                raise UserError(f"overrides.{name}: cannot be set here, {_DERIVED_ARGUMENTS[name]}")
            if name not in names:
                known = ", ".join(sorted(set(names) - _DERIVED_ARGUMENTS.keys()))
                raise UserError(f"overrides.{name}: unknown{nearest(name, names) or f'; known: {known}'}")
            build_value(kinds[name], value, f"overrides.{name}")
            if kinds[name] in (int, float):
                require(value > 0, f"overrides.{name}", value, "above 0")


@dataclass
class FlowConfig:
    """Training times: a law on [0, maximum], then the shift (t = 0 is data, t = 1 is noise).

    Attributes:
        time: `uniform`, or `logit_normal` with `mean` and `std`.
        maximum: upper end before the shift (RAE: 0.999).
        shift: alpha of the time shift, or `auto` = sqrt(C h w / 4096) of the latent (RAE). The sampler of the released
            pipeline takes the same unless it sets its own.
    """

    time: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    maximum: float = 1.0
    shift: float | Literal["auto"] = "auto"

    def validate(self) -> None:
        """Check the ranges."""
        require(self.std > 0, "std", self.std, "above 0")
        require(0 < self.maximum <= 1, "maximum", self.maximum, "above 0 and at most 1")
        require(self.shift == "auto" or self.shift > 0, "shift", self.shift, "above 0, or auto")

    def time_shift(self, latent_shape: tuple[int, int, int]) -> TimeShift:
        """The shift, for latents (C, h, w)."""
        return TimeShift.for_latent_shape(latent_shape) if self.shift == "auto" else TimeShift(self.shift)


@dataclass
class LossConfig:
    """Weights of the losses beside the main one; refused where the network lacks what the loss is about.

    Attributes:
        direction: 1 - cosine between predicted and true velocity over the channels (FasterDiT; LightningDiT has 1).
        base: of the base head's prediction, the same error as the last layer's (RAEv2).
        distillation: of a looped network's student, which leaves after a random number of loops. Its error to the
            target falls from this weight to 0 over `max_steps`, that to the last loop's prediction rises to it (ELT).
        variational_bound: of DiT's learned variance, in bits per dimension.
    """

    direction: float = 0.0
    base: float = 1.0
    distillation: float = 1.0
    variational_bound: float = 1.0

    def validate(self) -> None:
        """Check the ranges."""
        for name, value in vars(self).items():
            require(value >= 0, name, value, "at least 0")

    def at(self, step: int, max_steps: int) -> dict[str, float]:
        """Weights by the losses' names at optimiser step 0, 1, ... of a run."""
        student = student_loss_weight(step / max_steps)
        return {
            "flow": 1.0,
            "direction": self.direction,
            "base": self.base,
            "student": self.distillation * student,
            "distillation": self.distillation * (1 - student),
            "epsilon": 1.0,
            "variational_bound": self.variational_bound,
        }


@dataclass
class AlignmentTargetConfig:
    """One encoder that the generator's hidden states are aligned with.

    Attributes:
        encoder: local folder, Hub id, `timm:NAME`, or `digits` for the bundled one.
        revision: branch, tag or commit on the Hub.
        image_size: side in pixels the encoder sees; None: so that its tokens stand on the generator's grid.
        block: whose output is aligned, counted from 1.
        projector: from the block's width to the encoder's (REPA: mlp; iREPA: conv).
        projector_dim: hidden width of the mlp.
        loss: `cosine` (REPA); `spatial_cosine`, against targets normalised over the image (iREPA); `mse` (RAEv2).
        class_token: align the class token that `alignment.class_token` denoises as well, as one token more (REG).
    """

    encoder: str
    revision: str | None = None
    image_size: int | None = None
    block: int = 8
    projector: Literal["mlp", "conv", "linear"] = "mlp"
    projector_dim: int = 2048
    loss: Literal["cosine", "spatial_cosine", "mse"] = "cosine"
    class_token: bool = False

    def validate(self) -> None:
        """Check the ranges."""
        require(self.block >= 1, "block", self.block, "at least 1")
        require(self.projector_dim >= 1, "projector_dim", self.projector_dim, "at least 1")


@dataclass
class DispersiveConfig:
    """Dispersive loss (2506.09027): the samples' hidden states repel each other; no encoder.

    Attributes:
        block: whose output disperses, counted from 1; None: a quarter of the depth.
        temperature: tau.
        schedule: weight over the steps.
    """

    block: int | None = None
    temperature: float = 0.5
    schedule: AlignmentSchedule = field(default_factory=AlignmentSchedule)


@dataclass
class SelfAlignmentConfig:
    """Self-representation alignment (SRA, 2505.02831): an early block follows a late one of the EMA at less noise.

    Attributes:
        block, teacher_block: of the generator and of its EMA, counted from 1.
        max_time_gap: largest difference of their times.
        beta: of the smooth L1.
        schedule: weight over the steps.
    """

    block: int = 8
    teacher_block: int = 20
    max_time_gap: float = 0.2
    beta: float = 0.05
    schedule: AlignmentSchedule = field(default_factory=lambda: AlignmentSchedule(weight=0.2))


@dataclass
class AttentionAlignmentConfig:
    """Attention alignment (HASTE, 2505.16792): blocks attend where layers of an encoder do.

    Attributes:
        encoder, revision, image_size: as of a target.
        layers: of the encoder, counted from 0, or negative from the end.
        blocks: of the generator, counted from 1, as many.
        max_heads: heads compared, at most.
        schedule: weight over the steps.
    """

    encoder: str
    revision: str | None = None
    image_size: int | None = None
    layers: list[int] = field(default_factory=lambda: [8, 9, 10, 11])
    blocks: list[int] = field(default_factory=lambda: [5, 6, 7, 8])
    max_heads: int = 12
    schedule: AlignmentSchedule = field(default_factory=AlignmentSchedule)

    def validate(self) -> None:
        """Check that layers and blocks are pairs."""
        require(len(self.layers) == len(self.blocks), "layers", self.layers, f"as many as blocks={self.blocks}")


@dataclass
class ClassTokenConfig:
    """Representation entanglement (REG, 2507.01467): an encoder's class token is denoised beside the latent.

    Attributes:
        encoder, revision, image_size: as of a target.
        schedule: weight over the steps of the class token's velocity loss.
    """

    encoder: str
    revision: str | None = None
    image_size: int | None = None
    schedule: AlignmentSchedule = field(default_factory=lambda: AlignmentSchedule(weight=0.03))


@dataclass
class AlignmentConfig:
    """Representation alignment; a section that is left out takes no part.

    Attributes:
        targets: encoders of REPA (2410.06940) and its kin; their losses are averaged.
        schedule: weight of that loss over the steps.
        dispersive, self_alignment, attention, class_token: further terms, each with its own schedule.
    """

    targets: list[AlignmentTargetConfig] = field(default_factory=list)
    schedule: AlignmentSchedule = field(default_factory=AlignmentSchedule)
    dispersive: DispersiveConfig | None = None
    self_alignment: SelfAlignmentConfig | None = None
    attention: AttentionAlignmentConfig | None = None
    class_token: ClassTokenConfig | None = None

    def validate(self) -> None:
        """Check that a class token that is aligned is denoised too."""
        for number, target in enumerate(self.targets):
            fits = self.class_token is not None or not target.class_token
            require(fits, f"targets.{number}.class_token", True, "false without the section alignment.class_token")

    @property
    def schedules(self) -> dict[str, AlignmentSchedule]:
        """Schedules of the terms that take part, by the terms' names."""
        sections = {
            "dispersive": self.dispersive,
            "self_alignment": self.self_alignment,
            "attention": self.attention,
            "class_token": self.class_token,
        }
        own = {name: section.schedule for name, section in sections.items() if section is not None}
        return {"alignment": self.schedule, **own} if self.targets else own

    @property
    def changes_over_time(self) -> bool:
        """Whether a term may stop taking part, which leaves its weights without gradient."""
        return any(schedule.kind != "constant" for schedule in self.schedules.values())


@dataclass
class SamplerConfig:
    """The sampler of the released pipeline, what its calls do by default, and how the sample grids are drawn.

    Attributes:
        preset: a name of `repagen.sampler_preset`.
        num_inference_steps: None: the preset's.
        shift: alpha of the time shift; None: that of training.
        guidance_scale: 1 is unguided.
        guidance_interval: [low, high] in t, where guidance acts.
        guidance_channels: guide only the first so many channels of the latent; None: all.
        guidance_method: `cfg` (the null class), or `internal` (a base head); None: cfg.
        zero_init_steps: the first so many steps of guided sampling stand still (CFG-Zero*).
    """

    preset: str = "rae-euler"
    num_inference_steps: int | None = None
    shift: float | None = None
    guidance_scale: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    guidance_channels: int | None = None
    guidance_method: Literal["cfg", "internal"] | None = None
    zero_init_steps: int = 0

    @property
    def defaults(self) -> dict[str, Any]:
        """What a pipeline stores: the fields of `SamplingOptions`."""
        from repagen.schedulers.presets import SAMPLER_PRESETS

        return {
            "num_inference_steps": self.num_inference_steps or SAMPLER_PRESETS[self.preset].num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": list(self.guidance_interval),
            "guidance_channels": self.guidance_channels,
            "guidance_method": self.guidance_method,
            "zero_init_steps": self.zero_init_steps,
        }

    def validate(self) -> None:
        """Check the preset's name and the ranges."""
        from repagen.pipelines.sampling_options import SamplingOptions
        from repagen.schedulers.presets import SAMPLER_PRESETS

        require(self.preset in SAMPLER_PRESETS, "preset", self.preset, f"one of {', '.join(SAMPLER_PRESETS)}")
        require(self.shift is None or self.shift > 0, "shift", self.shift, "above 0")
        if self.num_inference_steps is not None:
            require(self.num_inference_steps >= 2, "num_inference_steps", self.num_inference_steps, "at least 2")
        require(self.guidance_scale >= 1, "guidance_scale", self.guidance_scale, "at least 1")
        try:
            SamplingOptions.resolve(self.defaults, {})
        except UserError as error:
            option, _, what = str(error).partition(" ")  # its messages start with the option
            raise UserError(f"{option}: {what}") from None


@dataclass
class SampleConfig:
    """Sample grids written as PNG during training, from the EMA weights; training is not touched by them.

    Attributes:
        every_steps: a grid after every so many optimiser steps; 0: none.
        num_images: images in a grid; classes or prompts take turns.
        prompts: of a text-to-image generator; none given: the first captions of the data.
        guidance_scale: 1 is unguided; None: the sampler's.
    """

    every_steps: int = 0
    num_images: int = 16
    prompts: list[str] = field(default_factory=list)
    guidance_scale: float | None = None

    def validate(self) -> None:
        """Check the ranges."""
        require(self.every_steps >= 0, "every_steps", self.every_steps, "at least 0")
        require(self.num_images >= 1, "num_images", self.num_images, "at least 1")
        scale = self.guidance_scale
        require(scale is None or scale >= 1, "guidance_scale", scale, "at least 1")


@dataclass(kw_only=True)
class GeneratorRunConfig(RunConfig):
    """What training and fine-tuning of a generator share.

    Attributes:
        data: images, or latents cached by `repagen cache`.
        flow: training times.
        loss: weights of the losses of particular networks.
        alignment: REPA and its kin.
        optimizer, ema: as everywhere.
        sample: grids during training.
        evaluation: figures during training.
    """

    data: DataConfig
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def validate(self) -> None:
        """Check the ranges."""
        super().validate()
        if self.evaluation.every_images and self.evaluation.reference is None and self.data.kind == "latents":
            raise UserError("evaluation.reference: needed, since data.kind=latents has no images to compare with")


@dataclass(kw_only=True)
class NewGeneratorConfig(GeneratorRunConfig):
    """What trainings share that make a generator, and a pipeline around it.

    Attributes:
        autoencoder: whose latents are generated.
        transformer: the network.
        sampler: of the released pipeline.
    """

    autoencoder: AutoencoderConfig
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)


def require_dropout(value: float, key: str = "label_dropout") -> None:
    """Check the share of samples that are told nothing.

    Raises:
        UserError: it is out of range.
    """
    require(0 <= value < 1, key, value, "at least 0 and below 1")


@dataclass(kw_only=True)
class GeneratorConfig(NewGeneratorConfig):
    """Everything about one training of a class-conditional (or unconditional) generator.

    Attributes:
        label_dropout: share of labels replaced by the null label, which classifier-free guidance needs.
    """

    label_dropout: float = 0.1

    def validate(self) -> None:
        """Check the ranges."""
        super().validate()
        require_dropout(self.label_dropout)
        require(not self.sample.prompts, "sample.prompts", self.sample.prompts, "none: this program's are classes")

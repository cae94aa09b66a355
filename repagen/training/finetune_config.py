"""The configuration of fine-tuning, `-m repagen.training.finetune --config NAME_OR_PATH [key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from repagen.config import load_config, read_preset, require
from repagen.data import DataConfig
from repagen.errors import UserError
from repagen.training.decoder_config import DecoderConfig, ReconstructionConfig, TrainedAutoencoderConfig
from repagen.training.discriminator import AdversarialConfig
from repagen.training.ema import EmaConfig
from repagen.training.generator_config import GeneratorRunConfig, require_dropout
from repagen.training.optimizer import OptimizerConfig
from repagen.training.perceptual import LpipsConfig
from repagen.training.run_config import RunConfig

Mode = Literal["full", "lora", "labels", "decoder"]


@dataclass
class LabelsConfig:
    """What becomes of the pipeline's classes, and where new ones begin.

    Attributes:
        keep: `all`, `none`, or names and ids of the classes that stay. Classes of the data whose names the pipeline
            knows stay in any case. None: `all` in the modes `lora` and `labels`, which change no class, and in `full`
            where `prior.images_per_class` keeps them alive; else `none`.
        start_from: new class => name or id of the pipeline's class whose embedding it begins with; the others begin
            with the mean of all of them.
    """

    keep: Literal["all", "none"] | list[int | str] | None = None
    start_from: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Check that classes are given by name or id."""
        for name, source in self.start_from.items():
            allowed = """the name or id of a class (a name with a dot: 'labels.start_from={"st. bernard": dog}')"""
            require(type(source) in (int, str), f"start_from.{name}", source, allowed)


@dataclass
class LoraTrainingConfig:
    """Low-rank adapters (2106.09685) of linear layers, through peft.

    Attributes:
        rank: of the update of each layer.
        alpha: the update is scaled by alpha / rank; None: by 1.
        dropout: of the layers' inputs; its draws depend on the split into processes and micro-batches.
        target_modules: ends of the layers' names; None: attention and feed-forward of all blocks.
        use_dora: magnitude and direction apart (DoRA, 2402.09353).
    """

    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    target_modules: list[str] | None = None
    use_dora: bool = False

    def validate(self) -> None:
        """Check the ranges."""
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.alpha is None or self.alpha >= 1, "alpha", self.alpha, "at least 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        require(self.target_modules is None or bool(self.target_modules), "target_modules", [], "at least one name")


@dataclass
class PriorConfig:
    """Prior preservation (DreamBooth 2208.12242, section 3.3): the pipeline's own images of what it shall not forget.

    They are drawn before training, once, into `output_dir/prior`, and trained on beside the data.

    Attributes:
        images_per_class: of a class-conditional pipeline's classes that are kept; 0: none.
        prompts: of a text-to-image pipeline: a list, or a text file with one a line; none: no images.
        images_per_prompt: drawn of each of them.
        share: of these images among those that are trained on, about; the data are repeated for it. None: every image
            counts once.
        guidance_scale, num_inference_steps: of their sampling; None: the pipeline's.
        forward_batch_size: images in one pass of the pipeline.
    """

    images_per_class: int = 0
    prompts: str | list[str] = field(default_factory=list)
    images_per_prompt: int = 1
    share: float | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | None = None
    forward_batch_size: int = 32

    def validate(self) -> None:
        """Check the ranges."""
        require(self.images_per_class >= 0, "images_per_class", self.images_per_class, "at least 0")
        require(self.images_per_prompt >= 1, "images_per_prompt", self.images_per_prompt, "at least 1")
        require(self.share is None or 0 < self.share < 1, "share", self.share, "above 0 and below 1")
        both = bool(self.images_per_class and self.prompts)
        require(not both, "prompts", self.prompts, "none beside prior.images_per_class, which is for classes")
        for name, least in {"guidance_scale": 1, "num_inference_steps": 2, "forward_batch_size": 1}.items():
            value = getattr(self, name)
            require(value is None or value >= least, name, value, f"at least {least}")

    @property
    def draws(self) -> bool:
        """Whether there are any."""
        return bool(self.images_per_class or self.prompts)


@dataclass(kw_only=True)
class FinetuneConfig(GeneratorRunConfig):
    """Everything about one fine-tuning of a pipeline's generator.

    Attributes:
        pipeline: folder or Hub id of a saved pipeline.
        revision: branch, tag or commit of it on the Hub.
        mode: `full` trains the whole generator; `lora` adapters and the rows of new classes in the label table;
            `labels` these rows alone, of a pipeline with classes. (`decoder` trains the decoder of the autoencoder,
            see `FinetuneDecoderConfig`.)
        label_dropout: share of labels, or of prompts, replaced by the null label or the null prompt, which
            classifier-free guidance needs.
        num_classes: classes that the generator has afterwards: `auto`, or the number that is expected.
        labels: classes that stay, and where new ones begin.
        lora: of mode `lora`.
        prior: images that keep the classes that stay alive.
    """

    finds_micro_batch: ClassVar[bool] = True

    pipeline: str
    revision: str | None = None
    mode: Mode
    label_dropout: float = 0.1
    num_classes: int | Literal["auto"] = "auto"
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    lora: LoraTrainingConfig = field(default_factory=LoraTrainingConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)

    @property
    def releases_pipeline(self) -> bool:
        """See `RunConfig`: other modes make an adapter."""
        return self.mode == "full"

    def validate(self) -> None:
        """Check that every key has an effect in the mode."""
        super().validate()
        _require_pipeline(self.pipeline)
        require_dropout(self.label_dropout)
        count = self.num_classes
        require(count == "auto" or count >= 0, "num_classes", count, "auto, or at least 0")
        if self.mode != "lora":
            _refuse_idle("lora", self.lora, LoraTrainingConfig(), f"mode={self.mode} trains no adapter")
        if self.mode != "full":
            keep = self.labels.keep
            require(keep in (None, "all"), "labels.keep", keep, f"all: mode={self.mode} changes no class")
            own = self.alignment.self_alignment is None
            require(own, "alignment.self_alignment", "given", f"left out: mode={self.mode} has no EMA of the network")
        if self.mode == "labels":
            _refuse_idle("prior", self.prior, PriorConfig(), "mode=labels changes no other class")
        if self.prior.images_per_class:
            require(self.labels.keep != "none", "labels.keep", "none", "another: prior.images_per_class keeps classes")
        if self.prior.draws:
            require(self.data.kind != "latents", "data.kind", "latents", "images, beside those of prior")
        else:
            reason = "prior.images_per_class=0 draws none, nor does prior.prompts=[]"
            _refuse_idle("prior", self.prior, PriorConfig(), reason)


def _require_pipeline(given: str) -> None:
    require(bool(given.strip()), "pipeline", given, "a folder or Hub id of a saved pipeline")


def _refuse_idle(section: str, given: Any, default: Any, reason: str) -> None:
    for name, value in vars(given).items():
        if value != getattr(default, name):
            raise UserError(f"{section}.{name}: {value} has no effect, {reason}; leave it out")


@dataclass(kw_only=True)
class FinetuneDecoderConfig(RunConfig):
    """Everything about one fine-tuning of a pipeline's decoder, whose latents stay as they are.

    Attributes:
        pipeline: folder or Hub id of a saved pipeline with a `RepresentationAutoencoder`.
        revision: branch, tag or commit of it on the Hub.
        mode: `decoder`.
        data: images.
        noise_tau: of the noise on the tokens; None: as the autoencoder was trained.
        l1_weight, lpips, adversarial, optimizer, ema, sample: as of decoder training.
    """

    finds_micro_batch: ClassVar[bool] = True

    pipeline: str
    revision: str | None = None
    mode: Literal["decoder"] = "decoder"
    data: DataConfig
    noise_tau: float | None = None
    l1_weight: float = 1.0
    lpips: LpipsConfig = field(default_factory=LpipsConfig)
    adversarial: AdversarialConfig = field(default_factory=lambda: AdversarialConfig(weight=0.0))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sample: ReconstructionConfig = field(default_factory=ReconstructionConfig)

    def validate(self) -> None:
        """Check the ranges, as decoder training does."""
        super().validate()
        _require_pipeline(self.pipeline)
        if self.micro_batch_size == "auto" and self.adversarial.weight:
            raise UserError(
                f"micro_batch_size: auto tries no step of the discriminator (adversarial.weight="
                f"{self.adversarial.weight}); give a divisor of global_batch_size"
            )
        require(self.noise_tau is None or self.noise_tau >= 0, "noise_tau", self.noise_tau, "at least 0")
        self.of_decoder(0.0).validate()

    def of_decoder(self, noise_tau: float) -> DecoderConfig:
        """The same as a configuration of decoder training; the statistics of the latents stay.

        Args:
            noise_tau: of the autoencoder.
        """
        shared = {own.name: getattr(self, own.name) for own in fields(RunConfig)}
        shared["micro_batch_size"] = None  # the run splits the batch, by this configuration
        return DecoderConfig(
            **shared,
            data=replace(self.data),
            autoencoder=TrainedAutoencoderConfig(
                pretrained=self.pipeline, noise_tau=noise_tau if self.noise_tau is None else self.noise_tau
            ),
            l1_weight=self.l1_weight,
            lpips=self.lpips,
            adversarial=self.adversarial,
            optimizer=self.optimizer,
            ema=self.ema,
            sample=self.sample,
            statistics=False,
        )


AnyFinetuneConfig = FinetuneConfig | FinetuneDecoderConfig


def load_finetune_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> AnyFinetuneConfig:
    """Read a preset or file with `key=value` words; its `mode` says which configuration it is.

    Raises:
        UserError: as `load_config`.
    """
    mode = read_preset(name_or_path, overrides).get("mode")
    schema: type[AnyFinetuneConfig] = FinetuneDecoderConfig if mode == "decoder" else FinetuneConfig
    return load_config(schema, name_or_path, overrides)

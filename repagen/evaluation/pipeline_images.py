"""Images that a pipeline samples on the fly, each a function of the seed and its own number."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from repagen.errors import UserError
from repagen.evaluation.samples import ImageSource, LabelMode, Rounding, Unreadable, to_uint8
from repagen.pipelines.provenance import component_settings, pipeline_sha256, training_record
from repagen.pipelines.sampling_options import SamplingOptions
from repagen.randomness import generator_for

if TYPE_CHECKING:
    from repagen.pipelines.class_to_image import ClassToImagePipeline
    from repagen.pipelines.text_to_image import TextToImagePipeline


class DrawnImages(ImageSource):
    """Images that a pipeline draws when they are asked for; a subclass says of what.

    Networks see batches of one shape, so that image i is the same bit by bit for every number of images and processes,
    where noise and condition are functions of (seed, index) alone. The pipeline's own progress bar is switched off.

    Args:
        pipeline: a `ClassToImagePipeline` or `TextToImagePipeline`.
        num_images: how many there are.
        seed: of noise, and of conditions that are drawn.
        rounding: how pixels become 8-bit.
        forward_batch_size: images in one pass of the pipeline. Another number rounds differently in the last bits.
        adapters: that the pipeline has loaded, as `load_adapters` describes them, for `protocol`.
        options: sampling options as in the pipeline's call (steps, guidance); those not given are the pipeline's own.

    Raises:
        UserError: when no image is asked for, or an option is unknown.
    """

    def __init__(
        self,
        pipeline: Any,
        num_images: int,
        *,
        seed: int = 0,
        rounding: Rounding = "round",
        forward_batch_size: int = 32,
        adapters: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> None:
        for name, value in {"num_images": num_images, "forward_batch_size": forward_batch_size}.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.pipeline = pipeline
        self.num_images = num_images
        self.seed = seed
        self.rounding: Rounding = rounding
        self.forward_batch_size = forward_batch_size
        self.adapters = [dict(adapter) for adapter in adapters]
        self.options = options
        self.resolved = SamplingOptions.resolve(self.pipeline.config.get("sampling_defaults"), options)
        self.pipeline.set_progress_bar_config(disable=True)

    def __len__(self) -> int:
        return self.num_images

    @abstractmethod
    def condition(self, indices: Sequence[int]) -> dict[str, Any]:
        """Arguments of the pipeline's call that say what the images at `indices` are of."""

    @property
    @abstractmethod
    def condition_facts(self) -> dict[str, Any]:
        """How the conditions come about, for `protocol`."""

    def noise(self, index: int) -> torch.Generator:
        """The generator of an image's noise."""
        return generator_for(self.seed, "evaluation noise", index)

    def load(self, indices: Sequence[int]) -> list[torch.Tensor | Unreadable]:
        """Sample the images at `indices`."""
        batches = (
            indices[start : start + self.forward_batch_size]
            for start in range(0, len(indices), self.forward_batch_size)
        )
        return [image for batch in batches for image in self._sample(batch)]

    def _sample(self, indices: Sequence[int]) -> list[torch.Tensor]:
        padded = [*indices, *[indices[-1]] * (self.forward_batch_size - len(indices))]
        images = self.pipeline(
            **self.condition(padded),
            generator=[self.noise(index) for index in padded],
            output_type="pt",
            **self.options,
        ).images[: len(indices)]
        finite = torch.isfinite(images).flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise UserError(f"{self.describe(indices[finite.index(False)])} has pixels that are not finite")
        return list(to_uint8(images, self.rounding).cpu())

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that moves the figure: conditions, seed, sampler, steps, guidance, dtype."""
        scheduler = self.pipeline.scheduler
        return {
            "kind": "pipeline",
            "path": self.pipeline.config.get("_name_or_path"),
            **({"adapters": self.adapters} if self.adapters else {}),
            **self.condition_facts,
            "seed": self.seed,
            "rounding": self.rounding,
            "forward_batch_size": self.forward_batch_size,
            "scheduler": type(scheduler).__name__,
            "shift": scheduler.config.get("shift"),
            "scheduler_config": component_settings(scheduler),
            "dtype": str(self.pipeline.transformer.dtype).removeprefix("torch."),
            **{name: value for name, value in asdict(self.resolved).items() if value is not None},
        }

    @property
    def training(self) -> dict[str, Any]:
        """What the pipeline's folder says about its training (`training.json`); empty where it says nothing."""
        return training_record(self.pipeline.config.get("_name_or_path"))

    def origin(self) -> str:
        """A hash of weights and settings of all parts of the pipeline, as they are now."""
        return pipeline_sha256(self.pipeline)


class PipelineImages(DrawnImages):
    """Images of classes, of prompts, or of nothing in particular, that a pipeline draws; see `DrawnImages`.

    Args:
        pipeline: class-conditional, unconditional where its transformer has no classes, or one that takes prompts.
        num_images: how many there are.
        label_mode: `balanced` takes class i mod num_classes (RAE, JiT); `random` draws it uniformly (SiT, REPA).
            RAE reports a FID about 0.1 lower with balanced labels.
        prompts: of a pipeline that takes them, which take turns.
        options: further ones of `DrawnImages`.

    Raises:
        UserError: when no image is asked for, an option is unknown, or prompts are missing or not taken.
    """

    def __init__(
        self,
        pipeline: ClassToImagePipeline | TextToImagePipeline,
        num_images: int,
        *,
        label_mode: LabelMode = "balanced",
        prompts: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(pipeline, num_images, **options)
        self.num_classes: int = self.pipeline.transformer.config.num_classes
        self.prompts = prompts
        takes_text = bool(getattr(self.pipeline.transformer, "takes_text", False))
        if takes_text != bool(prompts):
            raise UserError(
                f"prompts: {len(prompts)} given, but the pipeline takes {'them' if takes_text else 'none'}; "
                + ("give some, such as the captions of a dataset" if takes_text else "leave them out")
            )
        self.label_mode = label_mode if self.num_classes else "prompts" if prompts else "unconditional"

    def label(self, index: int) -> int | None:
        """Class of image `index`; None for a pipeline without classes."""
        if self.num_classes == 0:
            return None
        if self.label_mode == "balanced":
            return index % self.num_classes
        generator = generator_for(self.seed, "evaluation label", index)
        return int(torch.randint(self.num_classes, (), generator=generator))

    def prompt(self, index: int) -> str:
        """Prompt of image `index`, of a pipeline that takes them."""
        return self.prompts[index % len(self.prompts)]

    def condition(self, indices: Sequence[int]) -> dict[str, Any]:
        """Their prompts or classes; without either, how many they are."""
        if self.prompts:
            return {"prompt": [self.prompt(index) for index in indices]}
        if self.num_classes == 0:
            return {"class_labels": None, "num_images_per_prompt": len(indices)}
        return {"class_labels": [self.label(index) for index in indices]}

    def describe(self, index: int) -> str:
        """Number and prompt or label of a sample."""
        return f"sample {index} ({f'prompt {self.prompt(index)}' if self.prompts else f'label {self.label(index)}'})"

    @property
    def condition_facts(self) -> dict[str, Any]:
        """How labels are chosen, or which prompts there are."""
        if not self.prompts:
            return {"label_mode": self.label_mode}
        digest = hashlib.sha256()
        for index in range(self.num_images):
            digest.update(self.prompt(index).encode("utf-8", "surrogatepass") + b"\0")
        return {"label_mode": self.label_mode, "prompts_sha256": digest.hexdigest()}

"""Images that belong to prompts, and those of them that a pipeline draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from repagen.evaluation.pipeline_images import DrawnImages
from repagen.evaluation.samples import ImageSource
from repagen.evaluation.text_to_image.prompts import Prompt, PromptSet
from repagen.randomness import generator_for

if TYPE_CHECKING:
    from repagen.pipelines.text_to_image import TextToImagePipeline


class PromptedImages(ImageSource):
    """Images of prompts, those of a prompt following each other.

    Attributes:
        prompts: what the images were made from.
        images_per_prompt: how many images each prompt has.
    """

    prompts: PromptSet
    images_per_prompt: int

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of image `index`."""
        return self.prompts.prompts[index // self.images_per_prompt]


class PipelinePromptImages(DrawnImages, PromptedImages):
    """Images of prompts that a text-to-image pipeline draws; see `DrawnImages`.

    Noise of image n of prompt p is a function of (seed, p, n), so that more images a prompt change none of the others.

    Args:
        pipeline: what draws.
        prompts: what it is asked for.
        images_per_prompt: how many images of each.
        arguments: further ones of the pipeline's call, such as `negative_prompt`, `height` and `width`; None counts as
            not given.
        options: of `DrawnImages`, sampling options among them.

    Raises:
        UserError: when no image is asked for, or an option or size does not fit the pipeline.
    """

    def __init__(
        self,
        pipeline: TextToImagePipeline,
        prompts: PromptSet,
        images_per_prompt: int = 1,
        *,
        arguments: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, len(prompts) * images_per_prompt, **options)
        self.prompts = prompts
        self.images_per_prompt = images_per_prompt
        self.arguments = {name: value for name, value in (arguments or {}).items() if value is not None}
        self.pipeline.check_options(self.options)
        self.pipeline.latent_grid(self.arguments.get("height"), self.arguments.get("width"))

    def condition(self, indices: Sequence[int]) -> dict[str, Any]:
        """Their prompts."""
        return {"prompt": [self.prompt_of(index).text for index in indices], **self.arguments}

    def noise(self, index: int) -> torch.Generator:
        """The generator of an image's noise."""
        return generator_for(self.seed, "prompted noise", *divmod(index, self.images_per_prompt))

    def describe(self, index: int) -> str:
        """Number and prompt of an image."""
        return f"image {index % self.images_per_prompt} of prompt {self.prompt_of(index).id}"

    @property
    def condition_facts(self) -> dict[str, Any]:
        """Prompts, and what else the pipeline was asked for."""
        facts = {"prompts_sha256": self.prompts.sha256, "images_per_prompt": self.images_per_prompt, **self.arguments}
        return {**facts, "null_prompt": self.pipeline.config["null_prompt"]}

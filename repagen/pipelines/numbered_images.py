"""Numbered images of classes or prompts from one pipeline, each with the facts that its file carries."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from repagen.pipelines.provenance import component_settings
from repagen.randomness import generator_for

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class NumberedImages:
    """Images of a seed. Image i takes its noise from a generator of its own, so it does not depend on its neighbours.

    Networks see the batches in which images are numbered, and rounding differs between shapes of batches: equal facts
    mean equal pixels, another batch size or number of images may move a value by one.

    Attributes:
        pipe: a `ClassToImagePipeline` or `TextToImagePipeline`.
        subjects: class or prompt of each image, or None for each from an unconditional pipeline.
        seed: image i is a function of (seed, i).
        batch_size: images at once.
        options: sampling options that were given, as in the pipeline's call.
        origin: facts of all images: the model, its training, adapters, device.
        arguments: further ones of the pipeline's call, such as a negative prompt.
    """

    pipe: Any
    subjects: Sequence[int | str | None]
    seed: int
    batch_size: int
    options: Mapping[str, Any]
    origin: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.subjects)

    def facts(self, index: int) -> dict[str, Any]:
        """Return how image `index` comes about, as JSON knows it."""
        resolved = {name: value for name, value in asdict(self._resolved).items() if value is not None}
        if resolved["guidance_scale"] > 1:
            resolved["guidance_method"] = self.pipe.guidance_method
        scheduler = self.pipe.scheduler
        facts = {
            "kind": "sample",
            "index": index,
            "seed": self.seed,
            **self._subject_facts(self.subjects[index]),
            **self.arguments,
            **resolved,
            "scheduler": {"class": type(scheduler).__name__, **component_settings(scheduler)},
            "batch_size": self.batch_size,
            **self.origin,
        }
        return json.loads(json.dumps(facts, default=str))

    def _subject_facts(self, subject: int | str | None) -> dict[str, Any]:
        if isinstance(subject, str):
            return {"prompt": subject}
        return {"class_label": subject, "class_name": (self.pipe.config["id2label"] or {}).get(str(subject))}

    @property
    def _resolved(self) -> Any:
        return self.pipe.sampling_options(self.options)

    def describe(self, index: int) -> str:
        """Return the facts of image `index` that people look for, in one line."""
        facts = self.facts(index)
        trained = f", recipe {facts['recipe']}, step {facts['training_step']}" if facts["recipe"] else ""
        return (
            f"{_description(facts)}, seed {self.seed}, image {index}, "
            f"{facts['num_inference_steps']} steps, guidance {facts['guidance_scale']:g}{trained}"
        )

    def draw(self, wanted: Iterable[int] | None = None) -> Iterator[tuple[int, Image.Image]]:
        """Yield images with their numbers, in order, with a progress bar that shows the running step.

        Args:
            wanted: numbers of the images; None: all. Batches without one of them are not computed.

        Raises:
            UserError: options that do not fit the pipeline.
        """
        numbers = set(range(len(self)) if wanted is None else wanted)
        with tqdm(total=len(numbers), desc="sampling", unit="image") as progress:

            def show_step(pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
                progress.set_postfix_str(f"step {index + 1}/{pipe.num_timesteps}")
                return {}

            for start in range(0, len(self), self.batch_size):
                batch = range(start, min(start + self.batch_size, len(self)))
                if numbers.isdisjoint(batch):
                    continue
                for index, image in zip(batch, self.sample(batch, show_step), strict=True):
                    if index in numbers:
                        yield index, image
                        progress.update()

    def sample(self, batch: range, callback_on_step_end: Callable[..., dict[str, Any]]) -> list[Image.Image]:
        """Return the images numbered `batch`, drawn together, without a progress bar; arguments as of the pipeline."""
        subjects = [self.subjects[index] for index in batch]
        generators = [generator_for(self.seed, "sample", index) for index in batch]
        return self.pipe(
            None if subjects[0] is None else subjects,
            generator=generators,
            callback_on_step_end=callback_on_step_end,
            **self.options,
            **self.arguments,
        ).images


def _description(facts: Mapping[str, Any]) -> str:
    """Class or prompt in the words of one line."""
    if "prompt" in facts:
        return f"prompt {' '.join(facts['prompt'].split())!r}"
    label = "no class" if facts["class_label"] is None else f"class {facts['class_label']}"
    return f"{label} ({facts['class_name']})" if facts["class_name"] else label


def command_line(program: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return a command with its options, as a shell takes it: what to run for the same images.

    Args:
        program: the words before the options.
        options: name, with underscores => value or list of values; None and empty lists are left out.
    """
    words = [*program]
    for name, value in options.items():
        values = [value] if isinstance(value, str | int | float) else list(value or ())
        if values:
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)

"""Images that appear step by step and can be stopped: what the page asks for, and what it is shown."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from repagen.errors import UserError
from repagen.pipelines.numbered_images import NumberedImages
from repagen.pipelines.sample_command import choose_labels, sample_command_line

MAX_IMAGES = 16
MAX_STEPS = 1000


@dataclass(frozen=True)
class DrawingRequest:
    """What a visitor asks for. Image i is that of `repagen sample` with the same seed.

    Attributes:
        subject: name or id of a class, or a prompt, as the pipeline takes it; empty for an unconditional one.
        number: images.
        num_inference_steps, guidance_scale, guidance_interval: as in the pipeline's call.
        seed: whole number.
        trajectory_images: states of the first image on its way that are shown; 0: none.
        negative_prompt: what guidance leads away from; empty: as the pipeline does by itself.
    """

    subject: str
    number: int
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    seed: int
    trajectory_images: int
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        """Check what the pipeline does not.

        Raises:
            UserError: a number out of range.
        """
        for name, value, least, most in (
            ("number", self.number, 1, MAX_IMAGES),
            ("num_inference_steps", self.num_inference_steps, 2, MAX_STEPS),
            ("seed", self.seed, 0, 2**63 - 1),
            ("trajectory_images", self.trajectory_images, 0, MAX_IMAGES),
        ):
            if not least <= value <= most:
                raise UserError(f"{name} is {value}; give a whole number from {least} to {most}")


@dataclass(frozen=True)
class Drawing:
    """State of a drawing.

    Attributes:
        step, num_steps: done and altogether.
        trajectory: the first image on its way from noise, as far as it has come.
        images: the result; None until it is there.
    """

    step: int
    num_steps: int
    trajectory: tuple[Image.Image, ...] = ()
    images: tuple[Image.Image, ...] | None = None


def numbered_images(pipe: Any, origin: Mapping[str, Any], request: DrawingRequest) -> NumberedImages:
    """Return what `repagen sample` would draw with one batch.

    Args:
        pipe: a `ClassToImagePipeline` or `TextToImagePipeline`.
        origin: facts of all its images, as of `open_pipeline`.
        request: what to draw.

    Raises:
        UserError: a class that the pipeline has not, or options that do not fit it.
    """
    options = {
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "guidance_interval": request.guidance_interval,
    }
    pipe.check_options(options)
    subjects: Sequence[int | str | None]
    arguments: dict[str, Any] = {}
    given: dict[str, Any]
    if pipe.transformer.takes_text:
        subjects = [request.subject] * request.number
        arguments = {"negative_prompt": request.negative_prompt} if request.negative_prompt else {}
        given = {"prompt": request.subject, **arguments}
    else:
        words = [request.subject.strip()] if pipe.transformer.config.num_classes > 0 else None
        subjects = choose_labels(pipe, words, request.number)
        given = {"class_labels": words}
    given |= {"number": request.number, "seed": request.seed, "batch_size": request.number, "device": str(pipe.device)}
    command = sample_command_line(origin, {**given, **asdict(pipe.sampling_options(options))})
    origin = {**origin, "command": command}
    return NumberedImages(pipe, subjects, request.seed, request.number, options, origin, arguments)


def draw(numbered: NumberedImages, trajectory_images: int, stop: threading.Event) -> Iterator[Drawing]:
    """Draw in a thread of its own and yield every step; when the iterator is closed, the thread ends with its step.

    Args:
        numbered: the images.
        trajectory_images: how many of the first image's states on the way are decoded.
        stop: set it to give up after the running step.

    Raises:
        UserError: the pipeline refuses a value.
    """
    drawings: queue.Queue[Drawing | BaseException | None] = queue.Queue()
    closed = threading.Event()

    def show(drawing: Drawing) -> None:
        if stop.is_set() or closed.is_set():
            raise _Stopped
        drawings.put(drawing)

    def work() -> None:
        try:
            drawings.put(_run(numbered, trajectory_images, show))
        except BaseException as error:  # raised again where somebody listens
            drawings.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (drawing := drawings.get()) is not None:
            if isinstance(drawing, BaseException):
                raise drawing
            yield drawing
            if drawing.images is not None:
                return
    finally:
        closed.set()
        thread.join()


def _run(numbered: NumberedImages, trajectory_images: int, show: Callable[[Drawing], None]) -> Drawing | None:
    """Call the pipeline, showing every step; None if it was stopped."""
    pipe = numbered.pipe
    trajectory: list[Image.Image] = []

    def after_step(pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        steps = pipeline.num_timesteps
        if index in _evenly(trajectory_images, steps):
            trajectory.extend(pipeline.decode_latents(tensors["latents"][:1], "pil"))
        show(Drawing(index + 1, steps, tuple(trajectory)))
        return {}

    try:
        images = numbered.sample(range(len(numbered)), after_step)
    except _Stopped:
        pipe.maybe_free_model_hooks()
        return None
    return Drawing(pipe.num_timesteps, pipe.num_timesteps, tuple(trajectory), tuple(images))


class _Stopped(Exception):
    """Leaves the sampling loop."""


def _evenly(count: int, steps: int) -> set[int]:
    """Up to `count` of the steps 0 ... steps - 1 at even distances, the last one included."""
    return {round(place) for place in np.linspace(steps - 1, 0, count + 1)[:-1]} if count else set()

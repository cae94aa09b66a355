"""`repagen sample`: images of chosen classes from a saved pipeline, into a folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download, is_offline_mode
from tqdm import tqdm

from repagen.errors import UserError, refusing
from repagen.flow.guidance import GUIDANCE_METHODS
from repagen.hub.places import repository_command
from repagen.pipelines.grid import save_image_grid
from repagen.pipelines.sampling_options import SamplingOptions
from repagen.randomness import generator_for

if TYPE_CHECKING:
    from PIL import Image

    from repagen.pipelines.class_to_image import ClassToImagePipeline

_GRID_IMAGES = 64


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides the images: model, classes, sampler, seed, device."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder or Hub id of a saved pipeline")
    parser.add_argument(
        "--class-labels", nargs="+", metavar="CLASS", help="class names or ids, taken in turn; default: every class"
    )
    parser.add_argument("--number", type=int, metavar="N", help="images altogether; default: one per class label")
    add_sampler_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of (seed, i); default 0")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once; default 8")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")


def add_sampler_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the sampling options of the pipeline's call; what is left out is None, the pipeline's own."""
    options = parser.add_argument
    options("--num-inference-steps", type=int, metavar="N", help="in the sampler's counting; default: the pipeline's")
    options("--guidance-scale", type=float, metavar="S", help="above 1 guides; default: the pipeline's")
    options(
        "--guidance-interval", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="times at which guidance acts, 0 = data and 1 = noise; default: the pipeline's",
    )  # fmt: skip
    options("--guidance-method", choices=GUIDANCE_METHODS, help="default: the pipeline's")
    options("--guidance-channels", type=int, metavar="N", help="guide the first N channels; default: the pipeline's")
    options(
        "--zero-init-steps", type=int, metavar="N", help="guided: first steps of velocity 0; default: the pipeline's"
    )
    options("--num-loops", type=int, metavar="N", help="of a looped generator; default: as many as it has")


def sampler_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampler_options` that were given."""
    names = [field.name for field in fields(SamplingOptions)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repagen sample`."""
    add_sampling_arguments(parser)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="new folder for images/*.png and grid.png"
    )


def run(args: argparse.Namespace) -> str:
    """Write one PNG per image and a grid of the first ones; return what was written.

    Raises:
        UserError: a folder that is not empty, a model that cannot be loaded, or arguments that do not fit it.
    """
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output {args.output} exists and is no empty folder; name a new one")
    args.output.mkdir(parents=True, exist_ok=True)
    images = sample_images(args)
    first = list(islice(images, _GRID_IMAGES))
    save_image_grid(first, args.output / "grid.png")
    folder = args.output / "images"
    folder.mkdir()
    count = 0
    for image in (*first, *images):
        image.save(folder / f"{count:06d}.png")
        count += 1
    return f"{count} images are in {folder}, the first of them together in {args.output / 'grid.png'}"


def sample_images(args: argparse.Namespace) -> Iterator[Image.Image]:
    """Load the model and return its images one by one, with a progress bar.

    Image i takes its noise from a generator of its own, so it does not depend on the batch size or the number.

    Args:
        args: of `add_sampling_arguments`.

    Raises:
        UserError: a model that cannot be loaded, or arguments that do not fit it.
    """
    pipe = load_pipeline(args.model, args.device, args.dtype)
    labels = choose_labels(pipe, args.class_labels, args.number)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; give at least 1")
    return _sample(pipe, labels, args.seed, args.batch_size, sampler_options(args))


def load_pipeline(model: str, device: str | None, dtype: str) -> ClassToImagePipeline:
    """Load a pipeline from a folder or the Hub, onto a device.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    import torch

    from repagen.pipelines.class_to_image import ClassToImagePipeline

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with refusing(f"--device {device} cannot be used"):
        torch.zeros(1, device=device).item()
    kind = _class_name(model)
    if kind != "ClassToImagePipeline":
        raise UserError(f"--model {model} holds a {kind}; a ClassToImagePipeline is needed")
    with refusing(f"--model {model} cannot be loaded"):
        pipe = ClassToImagePipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def choose_labels(
    pipe: ClassToImagePipeline, words: Sequence[str] | None, number: int | None
) -> list[int | str] | list[None]:
    """Return one label per image: the words in turn (a name, else an id), or every class in turn.

    An unconditional model's labels are None, 16 by default.

    Raises:
        UserError: fewer than one image, or labels for an unconditional model.
    """
    if number is not None and number < 1:
        raise UserError(f"--number is {number}; give at least 1")
    num_classes = pipe.transformer.config.num_classes
    if num_classes == 0:
        if words:
            raise UserError("--class-labels was given, but the model is unconditional; leave it out")
        return [None] * (number or 16)
    choices: list[int | str] = [_label(pipe, word) for word in words] if words else list(range(num_classes))
    return [choices[index % len(choices)] for index in range(number or len(choices))]


def _class_name(model: str) -> str:
    index = Path(model) / "model_index.json"
    if not Path(model).is_dir() and (Path(model).exists() or Path(model).is_absolute()):
        raise UserError(f"--model {model}: no pipeline folder (with a model_index.json) or Hub id")
    fetching = f", which {repository_command(model)} fetches" if is_offline_mode() and model.count("/") == 1 else ""
    with refusing(f"--model {model}: no pipeline folder (with a model_index.json) or Hub id{fetching}"):
        if not Path(model).is_dir():
            index = Path(hf_hub_download(model, index.name))
        return json.loads(index.read_text())["_class_name"]


def _label(pipe: ClassToImagePipeline, word: str) -> int | str:
    names = {label.strip().lower() for label in (pipe.config["id2label"] or {}).values()}
    is_id = word.lstrip("-").isdecimal() and word.lower() not in names
    return int(word) if is_id else word


def _sample(
    pipe: ClassToImagePipeline, labels: Sequence[int | str | None], seed: int, batch_size: int, options: dict[str, Any]
) -> Iterator[Image.Image]:
    conditional = pipe.transformer.config.num_classes > 0
    with tqdm(total=len(labels), desc="sampling", unit="image") as progress_bar:
        for start in range(0, len(labels), batch_size):
            batch = labels[start : start + batch_size]
            generators = [generator_for(seed, "sample", start + offset) for offset in range(len(batch))]
            drawn: Any = pipe(list(batch) if conditional else None, generator=generators, **options)
            yield from drawn.images
            progress_bar.update(len(batch))

"""`repagen sample`: images of chosen classes or prompts from a saved pipeline, into a folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from repagen.errors import UserError, naming, refusing, require_at_least
from repagen.flow.guidance import GUIDANCE_METHODS
from repagen.pipelines.adapters import load_adapters
from repagen.pipelines.grid import image_grid
from repagen.pipelines.labels import resolve_class_labels
from repagen.pipelines.numbered_images import NumberedImages, command_line
from repagen.pipelines.png import read_png_facts, refuse_foreign_files, refuse_other_facts, save_png
from repagen.pipelines.provenance import pipeline_sha256, training_record
from repagen.pipelines.sampling_options import SamplingOptions

if TYPE_CHECKING:
    from repagen.pipelines.class_to_image import ClassToImagePipeline

_GRID_IMAGES = 64
_OF_CLASSES = ("ClassToImagePipeline",)
PIPELINE_KINDS = (*_OF_CLASSES, "TextToImagePipeline")
"""Classes of pipelines that draw images."""
_PROMPT_ARGUMENTS = ("prompt", "prompts_file", "negative_prompt", "height", "width")
_DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what makes a pipeline: model, adapters, device, precision, attention."""
    parser.add_argument("--model", required=True, metavar="PATH", help="folder or Hub id of a saved pipeline")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the model on the Hub")
    parser.add_argument(
        "--lora", nargs="+", metavar="PATH[=WEIGHT]", default=[], help="adapters to use, with their weights; default 1"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument(
        "--attention-backend",
        metavar="NAME",
        default=os.environ.get("DIFFUSERS_ATTN_BACKEND"),
        help="such as xformers, or auto; default: DIFFUSERS_ATTN_BACKEND, else diffusers' own choice",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides the images: model, classes or prompts, sampler, seed, device."""
    add_model_arguments(parser)
    parser.add_argument(
        "--class-labels", nargs="+", metavar="CLASS", help="class names or ids, taken in turn; default: every class"
    )
    add_prompt_arguments(parser)
    parser.add_argument("--number", type=int, metavar="N", help="images altogether; default: one per class or prompt")
    add_sampler_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="image i is a function of (seed, i); default 0")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once; default 8")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a text-to-image pipeline is asked for."""
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="of a text-to-image model: prompts, taken in turn")
    parser.add_argument("--prompts-file", metavar="FILE", help="one prompt per line, in place of --prompt")
    add_prompt_options(parser)


def add_prompt_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add what the call of a text-to-image pipeline takes beside prompts."""
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from; default: nothing")
    parser.add_argument("--height", type=int, metavar="PX", help="of the images; default: that of the training")
    parser.add_argument("--width", type=int, metavar="PX", help="of the images; default: that of the training")


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
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for images/*.png and grid.png: a new one, or that of an interrupted command",
    )


def run(args: argparse.Namespace) -> str:
    """Write one PNG per image, with its facts in the metadata, and a grid of the first ones; return what was written.

    Images that an interrupted command with the same arguments has written are kept.

    Raises:
        UserError: a folder that holds something else, a model that cannot be loaded, or arguments that do not fit it.
    """
    refuse_foreign_files(args.output, ("images", "grid.png"))
    folder = args.output / "images"
    numbered = open_numbered_images(args)
    paths = [folder / f"{index:06d}.png" for index in range(len(numbered))]
    refuse_foreign_files(folder, [path.name for path in paths])
    missing = _missing_images(numbered, paths)
    for index, image in numbered.draw(missing):
        save_png(image, paths[index], numbered.facts(index), numbered.describe(index))
    grid = image_grid([Image.open(path).convert("RGB") for path in paths[:_GRID_IMAGES]])
    save_png(grid, args.output / "grid.png", {**numbered.facts(0), "kind": "grid"}, f"from {numbered.describe(0)} on")
    kept = f" ({len(paths) - len(missing)} of them were there already)" if len(missing) < len(paths) else ""
    return f"{len(paths)} images are in {folder}{kept}, the first of them together in {args.output / 'grid.png'}"


def sample_images(args: argparse.Namespace) -> Iterator[Image.Image]:
    """Load the model and return its images one by one, with a progress bar.

    Args:
        args: of `add_sampling_arguments`.

    Raises:
        UserError: a model that cannot be loaded, or arguments that do not fit it.
    """
    return (image for _, image in open_numbered_images(args).draw())


def open_numbered_images(args: argparse.Namespace) -> NumberedImages:
    """Load the model with its adapters and make of the arguments what its images are.

    Args:
        args: of `add_sampling_arguments`.

    Raises:
        UserError: a model that cannot be loaded, or arguments that do not fit it.
    """
    require_at_least(args, {"number": 1, "batch_size": 1})
    pipe, origin = open_pipeline(args, PIPELINE_KINDS)
    subjects, arguments = _choose_subjects(pipe, args)
    options = sampler_options(args)
    pipe.check_options(options)
    names = ("class_labels", *_PROMPT_ARGUMENTS, "number", "seed", "batch_size")
    given = {name: getattr(args, name) for name in names}
    resolved = {"device": usable_device(args.device), **asdict(pipe.sampling_options(options))}
    command = sample_command_line(origin, {**given, **resolved})
    return NumberedImages(
        pipe, subjects, args.seed, args.batch_size, options, {**origin, "command": command}, arguments
    )


def open_pipeline(args: argparse.Namespace, kinds: Collection[str] = _OF_CLASSES) -> tuple[Any, dict[str, Any]]:
    """Load the model with its adapters; return it, and the facts that all its images share.

    Args:
        args: of `add_model_arguments`.
        kinds: classes of pipelines that are taken.

    Raises:
        UserError: a model or adapter that cannot be loaded, or a device or attention backend that cannot be used.
    """
    device = usable_device(args.device)
    _require_attention(args.attention_backend, device, args.dtype)
    pipe: Any = load_pipeline(args.model, device, args.dtype, args.revision, kinds)
    commit = getattr(pipe, "hub_commit", None)
    model = {"path": args.model, "commit": commit, "sha256": pipeline_sha256(pipe)}
    adapters = load_adapters(pipe, args.lora)
    if args.attention_backend:
        pipe.transformer.set_attention_backend(args.attention_backend)
    training = training_record(args.model, commit or args.revision)
    return pipe, {
        "model": model,
        "adapters": adapters,
        "recipe": training.get("recipe"),
        "training_step": training.get("step"),
        "dtype": args.dtype,
        "attention_backend": args.attention_backend,
        **_environment(device),
    }


def _environment(device: str) -> dict[str, str]:
    import torch

    is_gpu = torch.device(device).type == "cuda"
    return {"device": torch.cuda.get_device_name(device) if is_gpu else device, "torch": torch.__version__}


def sample_command_line(origin: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return the command that draws the same images, all of its options given.

    Args:
        origin: of `open_pipeline`.
        options: the others of the command, with underscores.
    """
    model = {
        "model": origin["model"]["path"],
        "revision": origin["model"]["commit"],
        "lora": [f"{adapter['path']}={adapter['weight']}" for adapter in origin["adapters"]],
        "dtype": origin["dtype"],
        "attention_backend": origin["attention_backend"],
    }
    return command_line(["repagen", "sample"], {**model, **options})


def _missing_images(numbered: NumberedImages, paths: Sequence[Path]) -> list[int]:
    """Return the numbers of the images that are not there yet; refuse images of another command."""
    missing = []
    for index, path in enumerate(paths):
        if path.exists():
            refuse_other_facts(path, read_png_facts(path), numbered.facts(index))
        else:
            missing.append(index)
    return missing


def usable_device(device: str | None) -> str:
    """Return the device that was asked for, cuda by default where there is one, after trying it.

    Raises:
        UserError: it cannot be used.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with refusing(f"--device {device} cannot be used"):
        torch.zeros(1, device=device).item()
    return device


def _require_attention(backend: str | None, device: str, dtype: str) -> None:
    """Run a chosen attention backend before the model is loaded; some are accepted and fail at the first step.

    Those of the Hub are fetched when the model takes them, and `auto` chooses one that is here.
    """
    import torch

    from repagen.layers.attention_trial import try_attention

    if backend in (None, "auto") or str(backend).endswith("_hub"):
        return
    trial = try_attention(str(backend), torch.device(device), getattr(torch, dtype))
    if not trial.runs:
        reason = trial.reason or f"its values are wrong by {trial.error:.2g}, {trial.tolerance:g} is allowed"
        raise UserError(f"--attention-backend {backend} does not run on {device} in {dtype} ({reason})")


def load_pipeline(
    model: str,
    device: str | None,
    dtype: str,
    revision: str | None = None,
    kinds: Collection[str] = _OF_CLASSES,
) -> Any:
    """Load a pipeline from a folder or the Hub, onto a device.

    Args:
        model: folder or Hub id.
        device: default: cuda if there is one, else cpu.
        dtype: name of a torch dtype.
        revision: branch, tag or commit on the Hub.
        kinds: classes of pipelines that are taken.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    import torch

    from repagen.pipelines.loading import saved_pipeline_class

    device = usable_device(device)
    with naming({"": "--model: "}):
        pipe = saved_pipeline_class(model, revision, kinds).from_pretrained(
            model, revision=revision, dtype=getattr(torch, dtype)
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _choose_subjects(pipe: Any, args: argparse.Namespace) -> tuple[Sequence[int | str | None], dict[str, Any]]:
    """Return class or prompt of each image, and what else the pipeline's call is given.

    Raises:
        UserError: classes for a pipeline of prompts or the other way round, no prompt, or a size that is not sampled.
    """
    given = {name: getattr(args, name) for name in _PROMPT_ARGUMENTS if getattr(args, name) is not None}
    if "text_encoder" not in pipe.config:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise UserError(f"--{option} was given, but the model draws classes; leave it out, or use --class-labels")
        return choose_labels(pipe, args.class_labels, args.number), {}
    if args.class_labels:
        raise UserError("--class-labels was given, but the model draws prompts; use --prompt or --prompts-file")
    prompts = _prompts(given.pop("prompt", None), given.pop("prompts_file", None))
    with naming({name: f"--{name}" for name in ("height", "width")}):
        pipe.latent_grid(args.height, args.width)
    return [prompts[index % len(prompts)] for index in range(args.number or len(prompts))], given


def _prompts(words: Sequence[str] | None, path: str | None) -> list[str]:
    if (words is None) == (path is None):
        raise UserError("give either --prompt with one or more texts, or --prompts-file")
    if path is None:
        return list(words or ())
    with refusing(f"--prompts-file {path} cannot be read as UTF-8 text"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path} holds no prompt; write one per line")
    return prompts


def choose_labels(
    pipe: ClassToImagePipeline, words: Sequence[str] | None, number: int | None
) -> list[int] | list[None]:
    """Return one class per image: those of the words in turn (a name, else an id), or every class in turn.

    An unconditional model's labels are None, 16 by default.

    Raises:
        UserError: no class of the model, or labels for an unconditional model.
    """
    num_classes = pipe.transformer.config.num_classes
    if num_classes == 0:
        if words:
            raise UserError("--class-labels was given, but the model is unconditional; leave it out")
        return [None] * (number or 16)
    given = [_label(pipe, word) for word in words] if words else list(range(num_classes))
    choices = resolve_class_labels(given, num_classes, pipe.config["id2label"])
    return [choices[index % len(choices)] for index in range(number or len(choices))]


def _label(pipe: ClassToImagePipeline, word: str) -> int | str:
    names = {label.strip().lower() for label in (pipe.config["id2label"] or {}).values()}
    is_id = word.lstrip("-").isdecimal() and word.lower() not in names
    return int(word) if is_id else word

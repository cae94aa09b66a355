"""`repagen reconstruct`: one's own images through an autoencoder, to look at what it loses."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from repagen.data import data_config_from_words
from repagen.errors import UserError, naming, refusing, require_at_least
from repagen.evaluation.metrics.perceptual import PerceptualDistance
from repagen.evaluation.places import require_result_folder, write_result
from repagen.evaluation.reconstruction.evaluate import (
    Comparison,
    compare_pairs,
    pair_comparisons,
    reconstruct,
    refuse_too_small,
)
from repagen.evaluation.reconstruction.own_images import CroppedFiles
from repagen.evaluation.reconstruction.result import PairedMetric
from repagen.evaluation.reporting import aligned, software_versions
from repagen.evaluation.result import SCHEMA
from repagen.evaluation.samples import ImageSource, Unreadable, dataset_images
from repagen.files import printable
from repagen.models.fingerprint import autoencoder_sha256
from repagen.models.latents import latent_shape, require_autoencoder, require_independent_latents
from repagen.models.opening import component_place, load_model, refuse_revision_of_folder
from repagen.pipelines.grid import image_grid
from repagen.pipelines.numbered_images import command_line
from repagen.pipelines.png import read_png_facts, refuse_foreign_files, refuse_other_facts, save_png
from repagen.pipelines.provenance import training_record
from repagen.pipelines.sample_command import usable_device

_METRICS: tuple[PairedMetric, ...] = ("psnr", "ssim", "lpips")
_SIDE_OF_ANY = 256  # where an autoencoder takes many sides, the usual one of published figures
_GRID_PAIRS, _GAP_PX = 32, 4
_KINDS = {"reconstructions": "reconstruction", "pairs": "original and reconstruction"}  # folder => what is in it
_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("data", nargs="*", metavar="data.KEY=VALUE", help="a dataset, in place of --images")
    parser.add_argument(
        "--autoencoder", required=True, metavar="PATH", help="folder or Hub id of an autoencoder, or of a pipeline"
    )
    parser.add_argument("--subfolder", metavar="NAME", help="where the autoencoder is in there; default: vae, if any")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="image files, and folders of them")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help=f"side of the squares; default: the autoencoder's, or {_SIDE_OF_ANY} where it takes many",
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=_METRICS, help="default: psnr, ssim, and lpips where its weights are here"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once; default 32")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for pairs/*.png, reconstructions/*.png, grid.png and metrics.json: a new one, or that of an "
        "interrupted command",
    )


def run(args: argparse.Namespace) -> str:
    """Reconstruct every image; write it alone, beside its original, and with its figures; return what was written.

    Images become squares as in training: the short side is resized, the middle kept; nothing is squashed. Batches that
    an interrupted command with the same arguments has written are kept.

    Raises:
        UserError: arguments that contradict each other, a folder that holds something else, an autoencoder that cannot
            be loaded, or no image that can be read.
    """
    _require_arguments(args)
    device = torch.device(usable_device(args.device))
    autoencoder, revision = _open(args)
    source, side = _source(args, autoencoder)
    autoencoder.to(device)
    comparisons, left_out = _comparisons(args.metrics, device)
    refuse_too_small(comparisons, side, device)
    task = _Task(args, autoencoder, revision, source, side, comparisons)
    for start in tqdm(range(0, len(source), args.batch_size), desc="reconstructions", unit="batch"):
        task.run(range(start, min(start + args.batch_size, len(source))))
    if not task.images:
        raise UserError(f"none of the {len(source)} images can be read: {task.broken_lines(3)}; replace them")
    return task.finish(left_out)


@dataclass
class _Task:
    """What is done with every batch, and what came of it."""

    args: argparse.Namespace
    autoencoder: Any
    revision: str | None
    source: ImageSource
    side: int
    comparisons: Mapping[PairedMetric, Comparison]
    images: list[dict[str, Any]] = field(default_factory=list)
    broken: list[Unreadable] = field(default_factory=list)
    shown: list[Image.Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        args, training = self.args, training_record(self.args.autoencoder, self.revision)
        names = ("autoencoder", "subfolder", "images", "image_size", "metrics", "batch_size")
        resolved = {"revision": self.revision, "device": str(self.autoencoder.device)}
        options = {name: getattr(args, name) for name in names} | resolved
        self.origin = {
            "image_size": self.side,
            "crop": self.source.protocol["crop"],
            "autoencoder": {
                "path": args.autoencoder,
                "revision": self.revision,
                "class": type(self.autoencoder).__name__,
                "sha256": autoencoder_sha256(self.autoencoder),
                "recipe": training.get("recipe"),
                "training_step": training.get("step"),
            },
            "command": command_line(["repagen", "reconstruct", *args.data], options),
        }
        self.origin = json.loads(json.dumps(self.origin))  # as it comes back from a file
        self.files = self._file_names()
        for folder in _KINDS:
            refuse_foreign_files(args.output / folder, self.files)

    def run(self, indices: range) -> None:
        """Reconstruct the images at `indices` and write them, if not all are there already."""
        loaded = dict(zip(indices, self.source.load(indices), strict=True))
        self.broken += [image for image in loaded.values() if isinstance(image, Unreadable)]
        images = {index: image for index, image in loaded.items() if isinstance(image, torch.Tensor)}
        kept = [self._is_kept(index, original) for index, original in images.items()]  # each file is looked at
        if not all(kept):
            self._make(images)
        for index in images:
            self._note(index)

    def _file_names(self) -> list[str]:
        """Of all images, broken ones included."""
        stems = [""] * len(self.source)
        if isinstance(self.source, CroppedFiles):
            stems = [f"-{printable(path.stem)[:60]}" for path in self.source.paths]
        return [f"{index:06d}{stem}.png" for index, stem in enumerate(stems)]

    def _facts(self, index: int) -> dict[str, Any]:
        size = self.source.sizes[index] if isinstance(self.source, CroppedFiles) else None
        return {"index": index, "source": self.source.describe(index), "source_size": size and list(size)}

    def _paths(self, index: int) -> dict[str, Path]:
        """Kind of a file, as its facts say it => the file."""
        return {kind: self.args.output / folder / self.files[index] for folder, kind in _KINDS.items()}

    def _is_kept(self, index: int, original: torch.Tensor) -> bool:
        """Whether an interrupted command has written an image, of these pixels."""
        for kind, path in self._paths(index).items():
            if not path.is_file():
                return False
            facts = read_png_facts(path)
            figures: dict[str, Any] = {metric: facts.get(metric, "not there") for metric in self.comparisons}
            refuse_other_facts(path, facts, {"kind": kind, **self._facts(index), **figures, **self.origin})
        with Image.open(self._paths(index)[_KINDS["pairs"]]) as pair:
            left = pair.crop((0, 0, self.side, self.side))
        return left.tobytes() == original.permute(1, 2, 0).contiguous().numpy().tobytes()

    def _make(self, images: Mapping[int, torch.Tensor]) -> None:
        names = [self.source.describe(index) for index in images]
        originals = torch.stack(list(images.values()))
        reconstructions = reconstruct(self.autoencoder, originals, names)
        figures = compare_pairs(self.comparisons, self.autoencoder.device, originals, reconstructions, names)
        for row, index in enumerate(images):
            self._write(index, originals[row], reconstructions[row], figures[row])

    def _write(
        self, index: int, original: torch.Tensor, reconstruction: torch.Tensor, figures: Mapping[Any, float]
    ) -> None:
        pair = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in (original, reconstruction)]
        pictures = [pair[1], image_grid(pair, columns=2, gap_px=_GAP_PX)]
        told = ", ".join(f"{key.upper()} {value:.4g}" for key, value in figures.items())
        for picture, (kind, path) in zip(pictures, self._paths(index).items(), strict=True):
            facts = {"kind": kind, **self._facts(index), **figures, **self.origin}
            save_png(picture, path, facts, f"{kind} of {self.source.describe(index)}: {told}")

    def _note(self, index: int) -> None:
        """Take an image that is written into the figures, and into the grid if there is room."""
        alone, pair = self._paths(index).values()
        facts = read_png_facts(alone)
        figures: dict[str, Any] = {metric: facts[metric] for metric in self.comparisons}
        self.images.append({"file": alone.name, **self._facts(index), **figures})
        if len(self.shown) < 2 * _GRID_PAIRS:
            with Image.open(pair) as image:
                lefts = (0, self.side + _GAP_PX)
                self.shown += [image.crop((left, 0, left + self.side, self.side)) for left in lefts]

    def finish(self, left_out: str) -> str:
        """Write the grid and the figures; return them in short."""
        output, count = self.args.output, len(self.images)
        columns = 2 * max(1, round((len(self.shown) / 2) ** 0.5))
        grid = image_grid(self.shown, columns=columns, gap_px=_GAP_PX)
        save_png(
            grid, output / "grid.png", {"kind": "grid", **self.origin}, "originals, each beside its reconstruction"
        )
        means = {metric: sum(image[metric] for image in self.images) / count for metric in self.comparisons}
        content = {
            "schema": SCHEMA,
            "kind": "own reconstructions",
            "metrics": means,
            "num_samples": count,
            **self.origin,
            "left_out": left_out,
            "images": self.images,
            "broken": [{"source": image.name, "reason": image.reason} for image in self.broken],
            "versions": software_versions(),
        }
        write_result(output / "metrics.json", content)
        return aligned(
            [
                *(
                    (metric.upper(), f"{value:.4g}{' dB' if metric == 'psnr' else ''}")
                    for metric, value in means.items()
                ),
                ("images", f"{count} of {self.side} px{self._reshaped()}"),
                *([("broken", f"{len(self.broken)} left out: {self.broken_lines(_LISTED)}")] if self.broken else []),
                *([("left out", left_out)] if left_out else []),
                ("written", f"{output}: pairs/*.png, reconstructions/*.png, grid.png, metrics.json"),
            ]
        )

    def broken_lines(self, count: int) -> str:
        """The first images that cannot be read, with their reasons."""
        more = f", and {len(self.broken) - count} more" if len(self.broken) > count else ""
        return ", ".join(f"{image.name} ({image.reason})" for image in self.broken[:count]) + more

    def _reshaped(self) -> str:
        """How many images were not squares of the side before, where that is known."""
        sizes = [image["source_size"] for image in self.images if image["source_size"]]
        cropped = sum(width != height for width, height in sizes)
        enlarged = sum(min(size) < self.side for size in sizes)
        counts = {"cropped to a square": cropped, "enlarged": enlarged}
        return "".join(f", {number} {what}" for what, number in counts.items() if number)


def _require_arguments(args: argparse.Namespace) -> None:
    require_at_least(args, {"batch_size": 1, "image_size": 1})
    if bool(args.data) == bool(args.images):
        raise UserError("give either --images PATH ... or a dataset, data.KEY=VALUE ..., and not both")
    if args.data and args.image_size:
        raise UserError(f"--image-size is for --images; say data.image_size={args.image_size} here")
    require_result_folder(args.output)
    refuse_foreign_files(args.output, (*_KINDS, "grid.png", "metrics.json"))


def _open(args: argparse.Namespace) -> tuple[Any, str | None]:
    """Load the autoencoder => it, and the revision it is of."""
    name = args.autoencoder
    with naming({"": "--autoencoder: "}):
        refuse_revision_of_folder(name, args.revision)
    place = component_place(name, "vae", "--autoencoder", args.revision)
    place["subfolder"] = args.subfolder or place["subfolder"]
    where = f"{name}, subfolder {place['subfolder']}" if place["subfolder"] else name
    with refusing(f"--autoencoder: {where} cannot be loaded; allowed: a folder or Hub id of an autoencoder"):
        autoencoder = load_model(name, "--autoencoder: model", **place).eval()
    require_autoencoder(autoencoder, f"--autoencoder {where} holds no autoencoder")
    require_independent_latents(autoencoder, "--autoencoder")
    return autoencoder, place["revision"]


def _source(args: argparse.Namespace, autoencoder: Any) -> tuple[ImageSource, int]:
    """Open the images, squares of a side that the autoencoder takes."""
    if args.data:
        config = data_config_from_words(args.data)
        with naming({"image_size": "data.image_size"}):
            latent_shape(autoencoder, config.image_size)
        return dataset_images(config), config.image_size
    own = getattr(autoencoder, "image_size", None) or getattr(autoencoder, "decoder_image_size", None)
    side = args.image_size or own or _SIDE_OF_ANY
    with naming({"image_size": "--image-size"}):
        latent_shape(autoencoder, side)
    return CroppedFiles(args.images, side), side


def _comparisons(
    metrics: Sequence[PairedMetric] | None, device: torch.device
) -> tuple[dict[PairedMetric, Comparison], str]:
    """The metrics that were asked for; of the default ones, LPIPS only where its weights are here, and why not."""
    perceptual, left_out = None, ""
    wanted = list(metrics or _METRICS)
    if "lpips" in wanted:
        try:
            perceptual = PerceptualDistance.from_files(backbone="alex")
        except UserError as error:
            if metrics:
                raise
            wanted.remove("lpips")
            left_out = f"lpips: {error}"
    return pair_comparisons(wanted, perceptual, device), left_out

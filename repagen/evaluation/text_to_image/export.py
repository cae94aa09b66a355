"""Images in the folder layouts that the evaluators of GenEval and DPG-Bench read.

The layouts are those of `evaluation/evaluate_images.py` of djghosh13/geneval (2310.11513) and of
`dpg_bench/compute_dpg_bench.py` of TencentQQGYLab/ELLA (2403.05135). Both evaluators pass over missing images in
silence, so that an export is complete or says that it is not.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from tqdm import tqdm

from repagen.data.images import BadImageError, decode_image
from repagen.errors import UserError, refusing
from repagen.evaluation.samples import ImageSource
from repagen.evaluation.text_to_image.prompts import Prompt, PromptSet
from repagen.evaluation.text_to_image.scores import require_uint8_rgb
from repagen.evaluation.text_to_image.scoring import load_readable
from repagen.files import TEMPORARY_PREFIX, replace_file, replace_folder
from repagen.pipelines.grid import save_image_grid

IMAGES_PER_PROMPT = 4
"""Of both benchmarks."""

_DPG_COLUMNS = 2


class ImageProvider(Protocol):
    """What makes the images, or has them."""

    def __call__(self, prompts: Sequence[str], indices: Sequence[int]) -> Sequence[torch.Tensor]:
        """Return the images of prompts.

        Args:
            prompts: one text for each image that is asked for.
            indices: number of each image within the whole export: prompt number x images_per_prompt + image number.
                A pipeline derives the image's generator from it.

        Returns:
            uint8 (3, H, W) each, in the order of the prompts.
        """


def provide_from(source: ImageSource) -> ImageProvider:
    """Provide images that exist already: image `index` of a source."""

    def provide(prompts: Sequence[str], indices: Sequence[int]) -> Sequence[torch.Tensor]:
        return load_readable(source, indices)

    return provide


def export_geneval(
    folder: str | Path,
    prompts: PromptSet,
    provider: ImageProvider,
    *,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    any_count: bool = False,
    batch_size: int = IMAGES_PER_PROMPT,
    resume: bool = False,
) -> int:
    """Write `00000/metadata.jsonl`, `00000/samples/00000.png` ... `00003.png` and `00000/grid.png` for every prompt.

    Each prompt's folder appears whole or not at all.

    Args:
        folder: new or empty, unless `resume`.
        prompts: of GenEval's `evaluation_metadata.jsonl`; its evaluator needs the metadata.
        provider: what makes the images.
        images_per_prompt: 4 in GenEval.
        any_count: allow another number; figures are then not GenEval's.
        batch_size: images asked for at once, rounded down to whole prompts, at least one.
        resume: keep the prompts of an earlier, interrupted export whose metadata, images and grid are whole. Which
            model made them is not known here.

    Returns:
        Number of prompts whose images were written now.

    Raises:
        UserError: on prompts without metadata, another number of images, a folder that is not empty, or one that
            holds something else.
    """
    for number, prompt in enumerate(prompts.prompts):
        if prompt.metadata is None or "tag" not in prompt.metadata:
            raise UserError(
                f"{prompts.path}: prompt {number} has no tag, which GenEval's evaluator reads; give its "
                "evaluation_metadata.jsonl"
            )
    _require_four(images_per_prompt, "GenEval", any_count)
    root = Path(folder)
    targets = {f"{number:05d}": prompt for number, prompt in enumerate(prompts.prompts)}
    _prepare(root, targets.keys(), resume)

    def write(name: str, images: Sequence[Image.Image]) -> None:
        replace_folder(root / name, lambda target: _write_geneval(target, targets[name], images))

    def is_whole(name: str) -> bool:
        return _is_whole_geneval(root / name, targets[name], images_per_prompt)

    return _write_missing(targets, provider, images_per_prompt, batch_size, is_whole, write)


def export_dpg(
    folder: str | Path,
    prompts: PromptSet,
    provider: ImageProvider,
    *,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    any_count: bool = False,
    batch_size: int = IMAGES_PER_PROMPT,
    resume: bool = False,
) -> int:
    """Write `<id>.png` for every prompt: its images as a grid of two columns, row by row.

    The evaluator cuts the grid into squares, so that all images must be square and of one size, which is its
    `--resolution`; `--pic-num` is `images_per_prompt`. Each file appears whole or not at all.

    Args:
        folder: new or empty, unless `resume`.
        prompts: of DPG-Bench's folder of `<id>.txt`; its evaluator finds the questions by id.
        provider: what makes the images.
        images_per_prompt: 4 in DPG-Bench.
        any_count: allow 1 to 3; figures are then not DPG-Bench's.
        batch_size: images asked for at once, rounded down to whole prompts, at least one.
        resume: keep the whole grids of an earlier, interrupted export. Which model made them is not known here.

    Returns:
        Number of prompts whose images were written now.

    Raises:
        UserError: on prompts without ids of their own, ids with a dot, images that are not square or not of one size,
            another number of images, a folder that is not empty, or one that holds something else.
    """
    if not prompts.named:
        raise UserError(
            f"{prompts.path}: its prompts have no ids, by which DPG-Bench finds its questions; give its folder "
            "of <id>.txt"
        )
    if dotted := [prompt.id for prompt in prompts.prompts if "." in prompt.id]:
        raise UserError(
            f"{prompts.path}: id {dotted[0]!r} has a dot, where DPG-Bench's evaluator ends the id; rename it"
        )
    _require_four(images_per_prompt, "DPG-Bench", any_count, most=IMAGES_PER_PROMPT)
    root = Path(folder)
    targets = {f"{prompt.id}.png": prompt for prompt in prompts.prompts}
    _prepare(root, targets.keys(), resume)
    sides: set[int] = set()

    def write(name: str, images: Sequence[Image.Image]) -> None:
        for image in images:
            _require_side(image.size, sides, f"prompt {targets[name].id}")
        replace_file(
            root / name, lambda target: save_image_grid(images, target, columns=min(_DPG_COLUMNS, len(images)))
        )

    def is_whole(name: str) -> bool:
        return _is_whole_dpg(root / name, images_per_prompt, sides)

    return _write_missing(targets, provider, images_per_prompt, batch_size, is_whole, write)


def _require_four(images_per_prompt: int, benchmark: str, any_count: bool, most: int | None = None) -> None:
    if images_per_prompt < 1 or (most is not None and images_per_prompt > most):
        raise UserError(
            f"images_per_prompt must be at least 1{f' and at most {most}' if most else ''}, got {images_per_prompt}"
        )
    if images_per_prompt != IMAGES_PER_PROMPT and not any_count:
        raise UserError(
            f"{benchmark} has {IMAGES_PER_PROMPT} images a prompt, got {images_per_prompt}; make as many, or allow "
            "another number with --any-count, which is then not the benchmark's figure"
        )


def _prepare(root: Path, names: Collection[str], resume: bool) -> None:
    """Make the folder, or refuse what is in it."""
    root.mkdir(parents=True, exist_ok=True)
    if resume:
        for name in names:  # what a killed export left
            leftover = root / f"{TEMPORARY_PREFIX}{name}"
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    found = sorted(path.name for path in root.iterdir())
    if found and not resume:
        raise UserError(
            f"{root}: is not empty (it has {found[0]}); give a new folder, or --resume to complete an earlier export"
        )
    if strange := [name for name in found if name not in names]:
        raise UserError(f"{root}: has {strange[0]}, which is not of this export; give another folder, or remove it")


def _write_missing(
    targets: Mapping[str, Prompt],
    provider: ImageProvider,
    images_per_prompt: int,
    batch_size: int,
    is_whole: Callable[[str], bool],
    write: Callable[[str, Sequence[Image.Image]], None],
) -> int:
    names = list(targets)
    missing = [number for number, name in enumerate(names) if not is_whole(name)]
    at_once = max(1, batch_size // images_per_prompt)
    with tqdm(total=len(missing), desc="export", unit="prompt") as progress:
        for start in range(0, len(missing), at_once):
            chosen = missing[start : start + at_once]
            indices = [number * images_per_prompt + image for number in chosen for image in range(images_per_prompt)]
            images = _ask(provider, [targets[names[index // images_per_prompt]].text for index in indices], indices)
            for place, number in enumerate(chosen):
                write(names[number], images[place * images_per_prompt : (place + 1) * images_per_prompt])
            progress.update(len(chosen))
    return len(missing)


def _ask(provider: ImageProvider, prompts: Sequence[str], indices: Sequence[int]) -> list[Image.Image]:
    images = provider(prompts, indices)
    if len(images) != len(prompts):
        raise UserError(f"{len(prompts)} prompts gave {len(images)} images; an image provider returns one for each")
    require_uint8_rgb(images)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]


def _write_geneval(target: Path, prompt: Prompt, images: Sequence[Image.Image]) -> None:
    samples = target / "samples"
    samples.mkdir(parents=True)
    (target / "metadata.jsonl").write_text(json.dumps(prompt.metadata), encoding="utf-8")
    for number, image in enumerate(images):
        image.save(samples / _sample_name(number))
    save_image_grid(images, target / "grid.png")


def _sample_name(number: int) -> str:
    return f"{number:05d}.png"


def _is_whole_geneval(folder: Path, prompt: Prompt, images_per_prompt: int) -> bool:
    """Whether a prompt's folder has all it must have.

    Raises:
        UserError: when it is that of another prompt.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        return False
    with refusing(f"{metadata}: cannot be read; remove its folder"):
        found = json.loads(metadata.read_text(encoding="utf-8"))
    if found != prompt.metadata:
        raise UserError(f"{metadata}: is of another prompt than {prompt.text!r}; give another folder, or remove it")
    expected = [_sample_name(number) for number in range(images_per_prompt)]
    if sorted(path.name for path in (folder / "samples").glob("*")) != expected:
        return False
    return all(_image_size(path) for path in (*(folder / "samples" / name for name in expected), folder / "grid.png"))


def _is_whole_dpg(path: Path, images_per_prompt: int, sides: set[int]) -> bool:
    if not path.exists() or (size := _image_size(path)) is None:
        return False
    columns = min(_DPG_COLUMNS, images_per_prompt)
    rows = math.ceil(images_per_prompt / columns)
    if size[0] % columns or size[1] % rows:
        raise UserError(f"{path}: is {size[0]}x{size[1]}, no grid of {images_per_prompt} images; remove it")
    _require_side((size[0] // columns, size[1] // rows), sides, str(path))
    return True


def _image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image that is whole; None where it is not."""
    try:
        return decode_image(path).size
    except BadImageError:
        return None


def _require_side(size: tuple[int, int], sides: set[int], which: str) -> None:
    """Refuse an image that is not square, or of another size than those before it."""
    sides.add(size[0])
    if size[0] != size[1] or len(sides) > 1:
        others = f"others have {min(sides - {size[0]})} px" if len(sides) > 1 else "it is not square"
        raise UserError(
            f"images of {which} are {size[0]}x{size[1]}: {others}; DPG-Bench's evaluator cuts squares of one size"
        )

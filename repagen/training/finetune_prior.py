"""Prior preservation (DreamBooth 2208.12242, section 3.3): a pipeline's own images, to train on beside new ones."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm.auto import tqdm

from repagen.config import flatten, value_at
from repagen.data import DataConfig, ImageDataset, SampleDataset, open_image_dataset
from repagen.data.buckets import Size, bucket_sizes
from repagen.data.config import CaptionConfig
from repagen.errors import UserError, one_line
from repagen.files import TEMPORARY_PREFIX, file_digest, put_file
from repagen.models.fingerprint import autoencoder_sha256
from repagen.models.identity import describe_autoencoder, describe_transformer
from repagen.models.modes import in_eval_mode
from repagen.randomness import generator_for
from repagen.training.finetune_config import FinetuneConfig, PriorConfig
from repagen.training.run import Run

_FACTS = "prior.json"


Part = tuple[SampleDataset, Sequence[int]]
"""A dataset, and the labels of the whole that its own become."""

Wanted = Sequence[int] | Sequence[str]
"""Ids of classes, or prompts."""


def prior_dataset(run: Run, config: FinetuneConfig, pipeline: Any, wanted: Wanted, facts: Any) -> ImageDataset:
    """The pipeline's own images of some of its classes, which are the labels in this order, or of prompts.

    They are drawn where they are not there yet, by all processes; an interrupted drawing goes on. Each image's noise
    depends on (seed, class or place of the prompt, number) alone. They are of the sizes of `data.buckets` in turn.

    Args:
        run: in whose folder they are kept.
        config: how many there are, and how they are drawn.
        pipeline: as it was before fine-tuning.
        wanted: what they are of.
        facts: what identifies its transformer. Images that were made of something else are drawn anew, or refused
            where the run has checkpoints.

    Raises:
        UserError: the folder cannot be used; images in it were changed, or are those of other settings than now.
    """
    folder = run.folder / "prior"
    with run.aside(), in_eval_mode(pipeline.transformer, pipeline.vae):
        run.on_main(lambda: _begin(run, folder, _made_of(config, pipeline, wanted, facts)))
        _draw_missing(run, folder, config, pipeline, wanted)
        run.accelerator.wait_for_everyone()  # all processes have drawn their share
        run.on_main(lambda: _seal(folder))
    captions = CaptionConfig() if config.prior.prompts else None
    kept = ("image_size", "horizontal_flip", "buckets", "bucket_step", "index_folder")
    same = {name: getattr(config.data, name) for name in kept}
    return open_image_dataset(DataConfig(path=str(folder), captions=captions, **same), several_sizes=True)


def prior_prompts(config: FinetuneConfig) -> list[str]:
    """The prompts that a configuration names: a list, or the lines of a file that are not blank.

    Raises:
        UserError: there is no such file, or nothing in it.
    """
    given = config.prior.prompts
    if not isinstance(given, str):
        return given
    try:
        lines = Path(given).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prior.prompts: {given}: cannot be read ({one_line(error)}); allowed: a text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prior.prompts: {given}: holds no prompt; write one a line")
    return prompts


def repeated(data: Part, count: int, share: float | None) -> list[Part]:
    """The data, as often as it takes so that `count` prior images are about a share of all; once without a share.

    Args:
        data: a dataset with its labels, as of `CombinedDataset`.
        count: of the prior images.
        share: of them.
    """
    times = 1 if share is None else round(count * (1 - share) / (share * len(data[0])))
    return [data] * max(1, times)


def _per(prior: PriorConfig) -> str:
    """The key that says how many images there are of each class or prompt."""
    return "images_per_prompt" if prior.prompts else "images_per_class"


def _made_of(config: FinetuneConfig, pipeline: Any, wanted: Wanted, facts: Any) -> dict[str, Any]:
    """Everything that the images depend on, as it comes back from JSON."""
    weaker, scheduler, prior = pipeline.guidance_transformer, pipeline.scheduler, config.prior
    drawing = (_per(prior), "guidance_scale", "num_inference_steps", "forward_batch_size")
    made_of = {
        "seed": config.seed,
        "prompts" if prior.prompts else "classes": list(wanted),
        "prior": {name: getattr(prior, name) for name in drawing},
        **({"data.buckets": _sizes(config)} if config.data.buckets else {}),
        "pipeline": {
            "transformer": facts,
            "guidance_transformer": None if weaker is None else describe_transformer(weaker)["weights"],
            "vae": [autoencoder_sha256(pipeline.vae), describe_autoencoder(pipeline.vae)["statistics"]],
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            "sampling_defaults": pipeline.config["sampling_defaults"],
        },
    }
    return dict(json.loads(json.dumps(made_of)))


def _begin(run: Run, folder: Path, made_of: dict[str, Any]) -> None:
    """Make the folder, or keep it where it holds images that were made alike."""
    old = _read_facts(folder).get("made_of")
    if old != made_of:
        if run.checkpoints.paths():
            _refuse_change(folder, old, made_of)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        put_file(folder / _FACTS, json.dumps({"made_of": made_of}).encode())
    for number in range(len(made_of.get("prompts") or made_of["classes"])):
        _path(folder, number, 0).parent.mkdir(exist_ok=True)
    for leftover in folder.rglob(f"{TEMPORARY_PREFIX}*"):  # of a killed process
        leftover.unlink()


def _read_facts(folder: Path) -> dict[str, Any]:
    """What the images were made of, and once all are there their digests; nothing where there are none."""
    path = folder / _FACTS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _refuse_change(folder: Path, old: dict[str, Any] | None, new: dict[str, Any]) -> NoReturn:
    """Name the first thing that is another one; training would go on with other images than it began with."""
    if old is None:
        per = next(iter(new["prior"]))
        raise UserError(
            f"prior.{per}: {new['prior'][per]}, but the run has checkpoints and no images "
            f"in {folder}; put this folder back, set the key back, or choose another output_dir"
        )
    before, now = flatten(old), flatten(new)
    key = next(key for key in sorted(before.keys() | now.keys()) if value_at(before, key) != value_at(now, key))
    raise UserError(
        f"{key}: {value_at(before, key)!r} when the images in {folder} were drawn but {value_at(now, key)!r} now; a "
        "run with checkpoints keeps its images: set it back, or choose another output_dir"
    )


def _seal(folder: Path) -> None:
    """Keep the images' digests once all are drawn, or refuse images that are no longer those."""
    facts = _read_facts(folder)
    found = {str(path.relative_to(folder)): file_digest(path)["sha256"] for path in sorted(folder.rglob("*.png"))}
    kept = facts.setdefault("images", found)
    changed = sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name))
    if changed:
        raise UserError(
            f"prior: {len(changed)} of the images in {folder} are not those that were drawn ({changed[0]}); delete "
            "them to have them drawn again, or choose another output_dir"
        )
    put_file(folder / _FACTS, json.dumps(facts).encode())


def _draw_missing(run: Run, folder: Path, config: FinetuneConfig, pipeline: Any, wanted: Wanted) -> None:
    size = config.prior.forward_batch_size
    count = getattr(config.prior, _per(config.prior))
    pairs = [(number, index) for number in range(len(wanted)) for index in range(count)]
    turns = len(_sizes(config))
    alike = [[pair for pair in pairs if sum(pair) % turns == turn] for turn in range(turns)]  # of one size each
    batches = [group[start : start + size] for group in alike for start in range(0, len(group), size)]
    own = batches[run.accelerator.process_index :: run.plan.processes]
    missing = [batch for batch in own if not all(_path(folder, *pair).is_file() for pair in batch)]
    shown = config.progress_bar and run.is_main and bool(missing)
    for batch in tqdm(missing, desc="prior images", unit="batch", disable=not shown):
        for pair, content in zip(batch, _draw(config, pipeline, wanted, batch), strict=True):
            path, named = _path(folder, *pair), wanted[pair[0]]
            if isinstance(named, str):
                put_file(path.with_suffix(".json"), json.dumps({"caption": named}).encode())
            if not path.is_file():
                put_file(path, content)


def _sizes(config: FinetuneConfig) -> list[Size]:
    """Height and width of the images, which take them in turn."""
    data = config.data
    side = data.image_size
    return bucket_sizes(data.buckets, side, data.bucket_step) or [(side, side)]


def _path(folder: Path, number: int, index: int) -> Path:
    return folder / f"{number:06d}" / f"{index:06d}.png"


@torch.no_grad()
def _draw(config: FinetuneConfig, pipeline: Any, wanted: Wanted, batch: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """The PNG files of a batch of (place of the class or prompt, number of the image), all of one size."""
    named = [wanted[number] for number, _ in batch]
    keys = [number if isinstance(name, str) else name for name, (number, _) in zip(named, batch, strict=True)]
    sizes = _sizes(config)
    height, width = sizes[sum(batch[0]) % len(sizes)]
    images = pipeline(
        named,
        **({"height": height, "width": width} if config.data.buckets else {}),
        num_inference_steps=config.prior.num_inference_steps,
        guidance_scale=config.prior.guidance_scale,
        generator=[
            generator_for(config.seed, "prior", key, index) for key, (_, index) in zip(keys, batch, strict=True)
        ],
    ).images
    for image in images:
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        yield stream.getvalue()

"""What a training run hands out: sample grids on the way, and a pipeline folder at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from repagen.data import SampleDataset
from repagen.errors import UserError
from repagen.models.modes import in_eval_mode
from repagen.pipelines.grid import save_image_grid
from repagen.pipelines.provenance import TRAINING_FILE, training_record
from repagen.randomness import generator_for
from repagen.schedulers.presets import SAMPLER_PRESETS, sampler_preset
from repagen.training.conditioning import Conditioning
from repagen.training.generator_config import GeneratorRunConfig, NewGeneratorConfig, SamplerConfig
from repagen.training.run import Run
from repagen.training.run_release import own_and_prior, release_and_publish

logger = logging.getLogger(__name__)


def build_pipeline(
    config: NewGeneratorConfig,
    model: Any,
    autoencoder: Any,
    conditioning: Conditioning,
    latent_shape: tuple[int, int, int],
) -> Any:
    """A pipeline around the model as it stands, with the recipe's sampler.

    Args:
        config: names the sampler.
        model: the generator, not wrapped.
        autoencoder: decodes its latents.
        conditioning: says what the pipeline is.
        latent_shape: (C, h, w), from which the time shift follows where it is `auto`.

    Raises:
        UserError: the released pipeline, or a sample grid, could not sample so; the message names the key.
    """
    shift = config.sampler.shift
    if shift is None and SAMPLER_PRESETS[config.sampler.preset].shift is not None:
        shift = config.flow.time_shift(latent_shape).alpha
    scheduler: Any
    with _naming_keys("sampler.shift"):
        scheduler, _ = sampler_preset(config.sampler.preset, shift=shift)
    defaults = config.sampler.defaults
    if not conditioning.guides(model) and config.sampler.guidance_method != "internal":
        defaults["guidance_scale"] = 1.0  # nothing was dropped, so there is nothing to guide by
    pipeline = conditioning.pipeline(
        transformer=model, vae=autoencoder, scheduler=scheduler, sampling_defaults=defaults
    )
    pipeline.set_progress_bar_config(disable=True)
    with _naming_keys("sampler.preset"):
        pipeline.check_options({})
    check_samplings(config, pipeline, "sampler.preset")
    return pipeline


def check_samplings(config: GeneratorRunConfig, pipeline: Any, key: str) -> None:
    """Refuse sample grids and evaluations that the pipeline cannot draw.

    Args:
        config: says which there are; the release always has a grid.
        pipeline: as in training.
        key: where its sampler comes from, for messages that are about no option.

    Raises:
        UserError: that names the key.
    """
    with _naming_keys(key, "sample"):
        pipeline.check_options({"guidance_scale": config.sample.guidance_scale})
    if config.evaluation.every_images:
        with _naming_keys(key, "evaluation"):
            pipeline.check_options(config.evaluation.options)


@contextmanager
def _naming_keys(otherwise: str, section: str = "sampler") -> Iterator[None]:
    """Name the key of the configuration in what a sampler or pipeline refuses.

    Args:
        otherwise: the key where the message does not start with an option of the sampler.
        section: of the options.
    """
    try:
        yield
    except UserError as error:
        option, _, what = str(error).partition(" ")
        if option in {field.name for field in fields(SamplerConfig)}:
            raise UserError(f"{section}.{option}: {what}") from None
        key = "autoencoder.path" if str(error).startswith("the vae") else otherwise
        raise UserError(f"{key}: {error}") from None


def write_sample_grid(config: GeneratorRunConfig, pipeline: Any, shown: Sequence[Any], path: Path) -> None:
    """Sample a grid with noise keyed by (seed, image) and write it as PNG; no running random stream is touched.

    Args:
        config: size of the grid, sampler and guidance.
        pipeline: holds the weights to sample from.
        shown: classes or prompts, which take turns; none = unconditional.
        path: the PNG.
    """
    count = config.sample.num_images
    conditions = [shown[index % len(shown)] for index in range(count)] if shown else None
    with in_eval_mode(pipeline.transformer, pipeline.vae):
        images = pipeline(
            conditions,
            num_images_per_prompt=1 if shown else count,
            guidance_scale=config.sample.guidance_scale,
            generator=[generator_for(config.seed, "sample grid", index) for index in range(count)],
            output_type="pt",
        ).images
    save_image_grid(images, path, gap_px=2)


def training_facts(run: Run, step: int, dataset: SampleDataset) -> dict[str, Any]:
    """What a model saw in `step` optimiser steps: goes beside its figures and its weights."""
    given, drawn = own_and_prior(dataset)
    return {
        "step": step,
        "images": step * run.plan.global_size,
        "dataset_images": len(given),
        **({"prior_images": drawn} if drawn else {}),
        "global_batch_size": run.plan.global_size,
        "program": run.program,
        "recipe": run.config.recipe.title,
    }


def save_with_facts(save: Callable[[Path], Any], facts: Mapping[str, Any], folder: Path) -> None:
    """Let `save` write into a folder, and put the facts of the training beside it; see `training_facts`."""
    save(folder)
    (folder / TRAINING_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def release_pipeline(
    run: Run,
    config: GeneratorRunConfig,
    pipeline: Any,
    step: int,
    dataset: SampleDataset,
    *,
    name: str,
    save: Callable[[Path], Any],
    shown: Sequence[Any],
    base_model: str | None,
    base_revision: str | None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pipeline, or what belongs to one, with its card and a sample grid, and push it.

    Args:
        run: of the training; it has the folder.
        config: of the sample grid.
        pipeline: as it stands.
        step: optimiser steps done.
        dataset: of the training.
        name: of the release's folder in the run's.
        save: writes it into a folder.
        shown: as of `write_sample_grid`.
        base_model, base_revision: what the training went on from; its own record of training is kept beside ours.
        facts: that stand beside those of the training.

    Raises:
        UserError: see `release_and_publish`.
    """
    seen = {**training_facts(run, step, dataset), **_started_from(base_model, base_revision), **(facts or {})}
    return release_and_publish(
        run,
        step,
        dataset,
        folder=run.folder / name,
        save=partial(save_with_facts, save, seen),
        draw=partial(write_sample_grid, config, pipeline, shown),
        prompt=next((prompt for prompt in shown if isinstance(prompt, str)), None),
        licences=pipeline.part_licences(),
        base_model=base_model,
        base_revision=base_revision,
    )


def _started_from(base_model: str | None, base_revision: str | None) -> dict[str, Any]:
    """The record of what a training went on from; one that cannot be read must not cost the release."""
    try:
        record = training_record(base_model, base_revision)
    except UserError as error:
        logger.warning("%s", error)
        return {}
    return {"started_from": record} if record else {}

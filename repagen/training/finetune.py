"""Fine-tune a saved pipeline on images of one's own: all of its generator, adapters, new classes, or its decoder.

    accelerate launch -m repagen.training.finetune --config NAME_OR_PATH pipeline=FOLDER_OR_ID data.path=FOLDER [...]

The same command again continues an interrupted run, and writes the result again after a finished one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repagen.data import CombinedDataset, SampleDataset, open_dataset
from repagen.errors import UserError, run_as_program
from repagen.hub.places import without_names
from repagen.models.autoencoder_representation import RepresentationAutoencoder
from repagen.models.fingerprint import hash_tensors
from repagen.models.identity import describe_autoencoder, describe_transformer
from repagen.models.latents import require_independent_latents
from repagen.pipelines.guided_prediction import class_token_dim
from repagen.training.conditioning import ClassConditioning
from repagen.training.decoder import AutoencoderTraining
from repagen.training.decoder_representation import RepresentationKind, refuse_other_size
from repagen.training.finetune_classes import ClassPlan, plan_classes
from repagen.training.finetune_config import (
    AnyFinetuneConfig,
    FinetuneConfig,
    FinetuneDecoderConfig,
    load_finetune_config,
)
from repagen.training.finetune_model import (
    PreparedTuning,
    TrainedParameters,
    open_pipeline,
    pinned_pipeline,
    prepare_classes,
    refuse_guidance_transformer,
    release_of,
    rows_of,
)
from repagen.training.finetune_prior import prior_dataset, repeated
from repagen.training.finetune_text import prepare_text, refuse_text_settings
from repagen.training.frozen import FrozenParts
from repagen.training.generator_alignment import refuse_single_samples
from repagen.training.generator_loop import GeneratorTraining, noise_process
from repagen.training.generator_model import refuse_idle_settings
from repagen.training.launch import program_main
from repagen.training.optimizer import resolve_optimizer
from repagen.training.rehearsal import FoundMicroBatch, Rehearsal
from repagen.training.release import check_samplings, save_with_facts, training_facts
from repagen.training.run import Run, open_run
from repagen.training.text_to_image import open_captioned


def train(config: AnyFinetuneConfig) -> Path:
    """Fine-tune, or continue, and release the result.

    Returns:
        The folder of the result: `output_dir/pipeline`, or `output_dir/adapter` in the modes `lora` and `labels`.

    Raises:
        UserError: for whatever the user can repair; see the message.
        RunStopped: when a signal stopped the run after a checkpoint.
    """
    config = replace(config, optimizer=resolve_optimizer(config.optimizer, config.device))
    with open_run(config, "finetune") as run:
        config.revision = run.on_main(partial(pinned_pipeline, config.pipeline, config.revision))
        pipeline = open_pipeline(config.pipeline, config.revision)
        if isinstance(config, FinetuneConfig) and pipeline.transformer.takes_text:
            return _train_generator(config, run, pipeline, open_captioned(config.data))
        dataset = open_dataset(config.data)
        _refuse_empty_classes(dataset)
        if isinstance(config, FinetuneDecoderConfig):
            return _train_decoder(config, run, pipeline, dataset)
        return _train_generator(config, run, pipeline, dataset)


def _refuse_empty_classes(dataset: Any) -> None:
    """Refuse classes without images, which datasets from the Hub may name: their rows would stay as they begin."""
    counts = torch.bincount(dataset.labels, minlength=dataset.num_classes)
    empty = [name for name, count in zip(dataset.class_names, counts.tolist(), strict=False) if count == 0]
    if empty:
        raise UserError(
            f"data: no image of {', '.join(empty[:10])}{' ...' if len(empty) > 10 else ''} ({len(empty)} of "
            f"{dataset.num_classes} classes); add some, or leave these classes out of the data"
        )


# --- generator -----------------------------------------------------------------------------------------------------


def _train_generator(config: FinetuneConfig, run: Run, pipeline: Any, data: SampleDataset) -> Path:
    model = pipeline.transformer
    frozen = _open_frozen(config, run, pipeline, data)
    facts = {
        "pretrained": describe_transformer(model)["weights"],
        "time shift": pipeline.scheduler.config.get("shift"),
    }
    prepare = prepare_text if model.takes_text else _prepare_classes
    prepared = prepare(config, run, pipeline, data, facts["pretrained"])
    check_samplings(config, pipeline, "pipeline")
    training = GeneratorTraining(
        run,
        config,
        pipeline,
        noise_process(config, model, frozen.latent_shape, prepared.conditioning.dropout, facts["time shift"]),
        frozen,
        prepared.conditioning,
        prepared.dataset,
        trained=None if config.mode == "full" else TrainedParameters(model),
    )
    found = FoundMicroBatch()
    start_step = training.restore({**facts, **prepared.facts}, {"micro_batch": found})
    trained = training.step.objective
    networks = [trained, *frozen.networks]
    rehearsal = Rehearsal(run, prepared.dataset, training.rehearse, trained, networks, config.optimizer, training.ema)
    rehearsal(start_step, found)
    refuse_single_samples(config.alignment, run.plan.micro_size)
    training.train(start_step)
    name, save = release_of(config, pipeline, prepared.new_rows)
    told = {"mode": config.mode, "pipeline": config.pipeline, "pipeline_transformer": facts["pretrained"]}
    base = {"base_model": config.pipeline, "base_revision": config.revision}
    return training.release(start_step, name, save, facts=told, **base)


def _prepare_classes(
    config: FinetuneConfig, run: Run, pipeline: Any, data: SampleDataset, pretrained: str
) -> PreparedTuning:
    """Give a pipeline its classes, and let train what the mode trains; `pretrained` identifies its generator."""
    model = pipeline.transformer
    refuse_text_settings(config)
    plan = plan_classes(config, model.config.num_classes, pipeline.config["id2label"], data.class_names)
    refuse_guidance_transformer(config, pipeline, plan)
    if config.evaluation.every_images and config.evaluation.reference is None and plan.num_classes > len(plan.of_data):
        raise UserError(
            f"evaluation.reference: needed, since {plan.num_classes} classes are sampled and the data has "
            f"{len(plan.of_data)} of them"
        )
    dataset = _with_prior(config, run, pipeline, plan, data, pretrained)
    prepare_classes(config, pipeline, plan)
    conditioning = ClassConditioning(plan.class_names, config.label_dropout, sorted(plan.of_data))
    return PreparedTuning(conditioning, dataset, {"classes": plan.class_names}, partial(rows_of, pipeline, plan))


def _open_frozen(config: FinetuneConfig, run: Run, pipeline: Any, data: SampleDataset) -> FrozenParts:
    """The pipeline's autoencoder and the encoders of the alignment; refused where data or generator do not fit."""
    model = pipeline.transformer
    require_independent_latents(pipeline.vae, "pipeline")
    frozen = FrozenParts(config, pipeline.vae, lambda shape: model.token_grid, data, run)
    if model.latent_shape != tuple(frozen.latent_shape):
        raise UserError(
            f"data.image_size: {config.data.image_size} px give latents {frozen.latent_shape}, but the generator of "
            f"{config.pipeline} makes {model.latent_shape}; set data.image_size to what its images have"
        )
    width = class_token_dim(model)
    if width != frozen.class_token_dim:
        given = f"one of width {frozen.class_token_dim}" if config.alignment.class_token else "none"
        wanted = f"one of width {width}, of the encoder it was trained with (REG)" if width else "none"
        raise UserError(
            f"alignment.class_token: {given}, but the generator of {config.pipeline} denoises {wanted}; "
            + ("set alignment.class_token.encoder to that encoder" if width else "leave it out")
        )
    refuse_idle_settings(config, model)
    return frozen


def _with_prior(
    config: FinetuneConfig, run: Run, pipeline: Any, plan: ClassPlan, data: SampleDataset, pretrained: str
) -> SampleDataset:
    """The data under the generator's labels, with the pipeline's own images of the classes that the data lacks."""
    parts: list[tuple[SampleDataset, Sequence[int]]] = [(data, plan.of_data)]
    lacking = [label for label in range(len(plan.kept)) if label not in plan.of_data]
    if config.prior.images_per_class and lacking:
        pipeline.to(run.device)
        prior = prior_dataset(run, config, pipeline, [plan.kept[k] for k in lacking], pretrained)
        parts = [*repeated(parts[0], len(prior), config.prior.share), (prior, lacking)]
    return CombinedDataset(parts, plan.class_names)


# --- decoder -------------------------------------------------------------------------------------------------------


def _train_decoder(config: FinetuneDecoderConfig, run: Run, pipeline: Any, dataset: SampleDataset) -> Path:
    autoencoder = pipeline.vae
    if not isinstance(autoencoder, RepresentationAutoencoder):
        raise UserError(
            f"mode: the autoencoder of {config.pipeline} is a {type(autoencoder).__name__}, and only the decoder of a "
            "RepresentationAutoencoder can be trained without a change of the latents; take another mode"
        )
    refuse_other_size(autoencoder, config.data.image_size)
    facts = {
        "autoencoder": without_names(describe_autoencoder(autoencoder)),
        "pretrained": hash_tensors(autoencoder.decoder.state_dict().values()),
    }
    decoder_config = config.of_decoder(autoencoder.config["noise_tau"])
    autoencoder.register_to_config(noise_tau=decoder_config.autoencoder.noise_tau)
    training = AutoencoderTraining(run, decoder_config, RepresentationKind(autoencoder, decoder_config, run), dataset)
    found = FoundMicroBatch()
    start_step = training.restore(facts, {"micro_batch": found})
    step = training.step
    networks = [autoencoder, *(part for part in (step.perceptual, step.discriminator) if part is not None)]
    rehearsal = Rehearsal(run, dataset, step.rehearse, training.kind.trained, networks, config.optimizer, training.ema)
    rehearsal(start_step, found)
    training.train(start_step)
    seen = training_facts(run, max(start_step, config.max_steps), dataset)
    told = {"mode": config.mode, "pipeline": config.pipeline, "pipeline_decoder": facts["pretrained"]}
    save = partial(save_with_facts, pipeline.save_pretrained, {**seen, **told})
    base = {"base_model": config.pipeline, "base_revision": config.revision}
    return training.release(start_step, "pipeline", save, **base)


def main(words: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    program_main(load_finetune_config, train, "finetune", words)


if __name__ == "__main__":
    run_as_program(main)

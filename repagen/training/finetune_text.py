"""Fine-tuning of a text-to-image pipeline: its captions, its null prompt, and images of what it shall not forget."""

from __future__ import annotations

from typing import Any

from repagen.data import CombinedDataset, SampleDataset
from repagen.errors import UserError
from repagen.training.finetune_config import FinetuneConfig, LabelsConfig
from repagen.training.finetune_model import PreparedTuning, let_train
from repagen.training.finetune_prior import Part, prior_dataset, prior_prompts, repeated
from repagen.training.run import Run
from repagen.training.text_conditioning import TextConditioning, shown_prompts


def prepare_text(
    config: FinetuneConfig, run: Run, pipeline: Any, data: SampleDataset, pretrained: str
) -> PreparedTuning:
    """Let train what the mode trains of a text-to-image pipeline.

    Args:
        config: of the fine-tuning.
        run: in whose folder the prior images are.
        pipeline: as it was saved.
        data: with captions.
        pretrained: identifies its generator.

    Raises:
        UserError: names the key: what is for classes, or adapters of layers that are not there.
    """
    _refuse_class_settings(config)
    null = pipeline.config["null_prompt"]
    if config.label_dropout and not pipeline.transformer.config.text_dropout_prob:
        raise UserError(
            f"label_dropout: {config.label_dropout}, but {config.pipeline} was trained with a prompt in every sample; "
            "set it to 0"
        )
    prompts = shown_prompts(config.sample.prompts, data, config.sample.num_images)
    conditioning = TextConditioning(pipeline.text_encoder, run, null, config.label_dropout, prompts)
    parts: list[Part] = [(data, [])]
    if config.prior.prompts:
        pipeline.to(run.device)
        prior = prior_dataset(run, config, pipeline, prior_prompts(config), pretrained)
        parts = [*repeated(parts[0], len(prior), config.prior.share), (prior, [])]
    let_train(config, pipeline.transformer)
    return PreparedTuning(conditioning, CombinedDataset(parts, []), {}, lambda: None)


def refuse_text_settings(config: FinetuneConfig) -> None:
    """Refuse what is for prompts, of a pipeline with classes.

    Raises:
        UserError: that names the key.
    """
    for key, given in {"prior.prompts": config.prior.prompts, "sample.prompts": config.sample.prompts}.items():
        if given:
            raise UserError(f"{key}: {config.pipeline} takes classes, not prompts; leave it out")


def _refuse_class_settings(config: FinetuneConfig) -> None:
    """Refuse what is for classes, of a pipeline with prompts."""
    if config.mode == "labels":
        raise UserError(
            f"mode: labels trains the rows of new classes, and {config.pipeline} takes prompts; take mode=lora or "
            "mode=full"
        )
    idle = {
        "num_classes": config.num_classes != "auto",
        "labels.keep": config.labels != LabelsConfig(),
        "prior.images_per_class": config.prior.images_per_class > 0,
    }
    for key, given in idle.items():
        if given:
            raise UserError(f"{key}: has no effect, {config.pipeline} takes prompts; leave it out")

"""The pipeline that is fine-tuned: opening it, giving it its classes and adapters, and what of it is released."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from repagen.config import nearest
from repagen.data import SampleDataset
from repagen.errors import UserError, naming
from repagen.hub.fetching import resolve_commit
from repagen.models.opening import pipeline_index, refuse_missing_folder
from repagen.pipelines.class_to_image import ClassToImagePipeline
from repagen.pipelines.lora import default_lora_targets
from repagen.pipelines.text_to_image import TextToImagePipeline
from repagen.randomness import derived_seed
from repagen.training.conditioning import Conditioning
from repagen.training.finetune_classes import ClassPlan, new_rows
from repagen.training.finetune_config import FinetuneConfig
from repagen.training.generator_model import refuse_label_dropout

logger = logging.getLogger(__name__)

_ALLOWED = "a folder or Hub id of a saved pipeline"
_PIPELINES = {kind.__name__: kind for kind in (ClassToImagePipeline, TextToImagePipeline)}


@dataclass(frozen=True)
class PreparedTuning:
    """What is particular to a fine-tuning of a pipeline with classes, or of one with prompts.

    Attributes:
        conditioning: what the generator is told.
        dataset: of the training, with the pipeline's own images where there are some.
        facts: that must not change when the run continues.
        new_rows: gives the embeddings of new classes, by name, as they are; None where there are none.
    """

    conditioning: Conditioning
    dataset: SampleDataset
    facts: Mapping[str, Any]
    new_rows: Callable[[], dict[str, torch.Tensor] | None]


def pinned_pipeline(name: str, revision: str | None) -> str | None:
    """Return the commit of a pipeline on the Hub; `revision` as it is for a folder.

    Raises:
        UserError: it is neither, or cannot be reached.
    """
    refuse_missing_folder(name, "pipeline", _ALLOWED)
    return revision if Path(name).is_dir() else resolve_commit(name, revision, what="pipeline")


def open_pipeline(name: str, revision: str | None) -> Any:
    """Load a saved pipeline in float32.

    Args:
        name: folder or Hub id, given as the key `pipeline`.
        revision: of `pinned_pipeline`.

    Raises:
        UserError: nothing that can be loaded is there, or a pipeline of another kind.
    """
    kind = _PIPELINES.get(str(pipeline_index(name, "pipeline", revision).get("_class_name")), ClassToImagePipeline)
    with naming({"": "pipeline: "}):
        pipeline: Any = kind.from_pretrained(name, revision=revision)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TrainedParameters:
    """The parameters of a model that are trained, by name: what is averaged and saved where the rest is frozen."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Any]:
        """=> name => parameter, detached unless `keep_vars`."""
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        return trained if keep_vars else {name: p.detach() for name, p in trained.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor], /) -> None:
        """Take over saved values.

        Raises:
            UserError: they are of other parameters.
        """
        own = self.state_dict()
        for name in own.keys() ^ state.keys():
            raise UserError(f"the weights in the checkpoint do not fit this fine-tuning: {name} is on one side only")
        for name, parameter in own.items():
            parameter.copy_(state[name])


class NewRows(nn.Module):
    """Makes the label table of a frozen one and of trained rows for the new classes."""

    def __init__(self, rows: torch.Tensor, first: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())
        self.first = first

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        """=> the table with these rows in the place of its own."""
        return torch.cat([table[: self.first], self.rows, table[self.first + len(self.rows) :]])


def refuse_guidance_transformer(config: FinetuneConfig, pipeline: Any, plan: ClassPlan) -> None:
    """Refuse to train an adapter with new classes for a pipeline that could not load it.

    Raises:
        UserError: says how to get a pipeline that can.
    """
    if config.mode != "full" and plan.new and pipeline.guidance_transformer is not None:
        raise UserError(
            f"pipeline: {config.pipeline} has a guidance_transformer without the new classes ({len(plan.new)}), so it "
            f"could not load the adapter of mode={config.mode}; save a copy without it, ClassToImagePipeline."
            "from_pretrained(..., guidance_transformer=None).save_pretrained(FOLDER), and give that"
        )


def prepare_classes(config: FinetuneConfig, pipeline: Any, plan: ClassPlan) -> None:
    """Give the generator its classes, and let train what the mode trains.

    Raises:
        UserError: names the key: adapters of layers that are not there; labels to drop, without a null class.
    """
    model = pipeline.transformer
    refuse_label_dropout(config.label_dropout, model, plan.num_classes, config.pipeline)
    if plan.num_classes:
        table = model.label_embedder.table.weight.detach()
        model.choose_classes(plan.kept, new_rows(table, plan, model.config.num_classes))
    let_train(config, model)
    if config.mode != "full" and plan.new:
        table = model.label_embedder.table
        rows = NewRows(table.weight.detach()[list(plan.new_ids)], plan.new_ids.start)
        register_parametrization(table, "weight", rows)
    _settle(pipeline, plan)


def let_train(config: FinetuneConfig, model: Any) -> None:
    """Let train all of a generator, or adapters of it alone, or nothing yet, as the mode says.

    Raises:
        UserError: adapters of layers that are not there.
    """
    model.float().train()
    if config.mode != "full":
        model.requires_grad_(False)
    if config.mode == "lora":
        _add_adapter(config, model)


def _add_adapter(config: FinetuneConfig, model: Any) -> None:
    from peft import LoraConfig

    lora = config.lora
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = lora.target_modules or default_lora_targets(model)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f"lora.target_modules: {target} is the end of no linear layer's name{nearest(target, ends)}; their "
                f"names end in {', '.join(ends)}"
            )
    torch.manual_seed(derived_seed(config.seed, "lora weights"))
    model.add_adapter(
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha or lora.rank,
            lora_dropout=lora.dropout,
            target_modules=targets,
            use_dora=lora.use_dora,
        )
    )


def _settle(pipeline: Any, plan: ClassPlan) -> None:
    """Make the pipeline's other parts and its sampling defaults fit its generator."""
    defaults = dict(pipeline.config["sampling_defaults"] or {})
    pipeline.register_to_config(id2label=plan.id2label)
    weaker = pipeline.guidance_transformer
    if weaker is not None and weaker.config.num_classes != plan.num_classes:
        logger.warning(
            "the pipeline's guidance_transformer has %d classes, the generator now %d: it is left out, and guidance "
            "is by the null class",
            weaker.config.num_classes,
            plan.num_classes,
        )
        pipeline.register_modules(guidance_transformer=None)
        if defaults.get("guidance_method") == "autoguidance":
            defaults["guidance_method"] = None
        if not (plan.num_classes and pipeline.transformer.config.class_dropout_prob):
            defaults["guidance_scale"] = 1.0
    pipeline.register_to_config(sampling_defaults=defaults or None)
    pipeline.check_options({})


def release_of(
    config: FinetuneConfig, pipeline: Any, new_rows: Callable[[], dict[str, torch.Tensor] | None]
) -> tuple[str, Any]:
    """=> name of the released folder, and what writes it: the pipeline, or the adapter with its new classes."""
    if config.mode == "full":
        return "pipeline", pipeline.save_pretrained
    return "adapter", partial(_save_adapter, pipeline, new_rows)


def rows_of(pipeline: Any, plan: ClassPlan) -> dict[str, torch.Tensor] | None:
    """Embeddings of the new classes, by name, as they are; None without any."""
    if not plan.new:
        return None
    table = pipeline.transformer.label_embedder.table.weight.detach()
    return {name: table[label] for name, label in zip(plan.new, plan.new_ids, strict=True)}


def _save_adapter(pipeline: Any, new_rows: Callable[[], dict[str, torch.Tensor] | None], folder: Path) -> None:
    from peft import get_peft_model_state_dict

    model = pipeline.transformer
    configs = getattr(model, "peft_config", {})
    layers = get_peft_model_state_dict(model, adapter_name="default") if configs else None
    metadata = configs["default"].to_dict() if configs else None
    rows = new_rows()
    more = {} if rows is None else {"label_rows": rows}
    pipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata, **more
    )

"""Converted models as folders that load as any other, with a model card and a record of where they are from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

import repagen
from repagen.conversion.recipes import OFFICIAL_FAMILIES, OfficialFamily, SamplingRecipe
from repagen.encoders import FAMILIES
from repagen.errors import UserError, refusing
from repagen.files import file_digest, replace_folder
from repagen.flow.time import TimeShift
from repagen.hub.card import PLACEHOLDER
from repagen.models.encoder_storage import SUBFOLDER
from repagen.pipelines.class_to_image import ClassToImagePipeline
from repagen.schedulers.presets import SAMPLER_PRESETS, sampler_preset

RECORD = "conversion.json"
"""Written beside every converted model: family, file, source, licence, sampler, versions."""

_LATENT_BATCHES = "latent_batches"


def build_pipeline(
    family: str, transformer: Any, vae: Any, guidance_transformer: Any = None, id2label: dict[str, str] | None = None
) -> ClassToImagePipeline:
    """Put a converted generator into a pipeline that samples as its family's published figures were sampled.

    Args:
        family: of the generator.
        transformer: the generator.
        vae: decodes its latents.
        guidance_transformer: a weaker generator, for autoguidance.
        id2label: class id (as a string) => name.

    Raises:
        UserError: components that do not work together.
    """
    recipe = OFFICIAL_FAMILIES[family].recipe(transformer.config)
    pipeline = ClassToImagePipeline(
        transformer=transformer,
        vae=vae,
        scheduler=_scheduler(recipe, transformer.config),
        guidance_transformer=guidance_transformer,
        id2label=id2label,
        sampling_defaults=_sampling_defaults(recipe, transformer.config, guidance_transformer is not None),
    )
    pipeline.check_components()
    return pipeline


def _scheduler(recipe: SamplingRecipe, config: Mapping[str, Any]) -> Any:
    side = config["sample_size"]
    latent = TimeShift.for_latent_shape((config["in_channels"], side, side))
    scheduler: Any
    scheduler, _ = sampler_preset(recipe.preset, shift=latent.alpha if recipe.shift_by_latent else None)
    return type(scheduler).from_config(scheduler.config, **recipe.scheduler)


def _sampling_defaults(recipe: SamplingRecipe, config: Mapping[str, Any], autoguided: bool) -> dict[str, Any]:
    steps = {"num_inference_steps": SAMPLER_PRESETS[recipe.preset].num_inference_steps}
    if autoguided:
        return {**steps, **(recipe.autoguidance or {})}
    has_null_class = config["num_classes"] > 0 and config["class_dropout_prob"] > 0
    guides = has_null_class or recipe.guidance.get("guidance_method") == "internal"
    return {**steps, **(recipe.guidance if guides else {})}


def standardise_by(vae: Any, batch_norm: nn.BatchNorm2d) -> None:
    """Make the latent statistics of a REPA-E checkpoint those of its autoencoder: z = (latent - mean) / sqrt(var).

    Args:
        vae: the `AutoencoderKL` trained with it; its config changes.
        batch_norm: the latents' running statistics, without eps, as REPA-E samples.

    Raises:
        UserError: another autoencoder, or one of another number of channels.
    """
    channels = batch_norm.num_features
    is_kl = isinstance(vae, AutoencoderKL)
    if not is_kl or vae.config["latent_channels"] != channels:
        raise UserError(
            f"--vae: repa_e needs the AutoencoderKL of {channels} channels it was trained with, got a "
            f"{type(vae).__name__} of {vae.config.get('latent_channels')}"
        )
    mean, variance = batch_norm.running_mean, batch_norm.running_var
    assert mean is not None and variance is not None
    # In float64, so that the square is the variance again, bit by bit.
    std = variance.double().sqrt()
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0, shift_factor=None)


def latent_batch_norm(vae: Any, record: Mapping[str, Any] | None = None) -> nn.BatchNorm2d:
    """The inverse of `standardise_by`.

    Args:
        vae: has `latents_mean` and `latents_std` in its config.
        record: of the conversion, with the number of batches that the statistics are of. Without it that is 0; nothing
            is computed from it, for REPA-E's batch norm has a fixed momentum.

    Raises:
        UserError: an autoencoder without such statistics.
    """
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        raise UserError("family 'repa_e' needs the pipeline whose vae has latents_mean and latents_std in its config")
    batch_norm = nn.BatchNorm2d(len(mean), eps=1e-4, momentum=0.1, affine=False)
    assert batch_norm.running_mean is not None and batch_norm.running_var is not None
    batch_norm.running_mean.copy_(torch.tensor(mean))
    batch_norm.running_var.copy_(torch.tensor(std, dtype=torch.float64).square())
    assert batch_norm.num_batches_tracked is not None
    batch_norm.num_batches_tracked.fill_((record or {}).get(_LATENT_BATCHES, 0))
    return batch_norm.eval()


def record_of(
    family: str,
    checkpoint: Path,
    config: Mapping[str, Any] | None,
    *,
    vae: Mapping[str, Any] | None = None,
    guidance_model: Path | None = None,
    component: Any = None,
    batch_norm: nn.BatchNorm2d | None = None,
) -> dict[str, Any]:
    """What is kept about a conversion, JSON-able.

    Args:
        family: of the checkpoint.
        checkpoint: the file.
        config: official constructor's arguments that were given.
        vae: (generators) what is known of the autoencoder.
        guidance_model: (generators) the weaker model's file.
        component: the pipeline or autoencoder that was made.
        batch_norm: (repa_e) of the latents, of which the autoencoder's config holds the rest.
    """
    official = OFFICIAL_FAMILIES[family]
    record: dict[str, Any] = {
        "family": family,
        "title": official.title,
        "paper": f"https://arxiv.org/abs/{official.paper}",
        "source": official.source,
        "licence": official.licence,
        "compared_with_official_outputs": official.compared,
        "checkpoint": {"name": checkpoint.name, **file_digest(checkpoint)},
        "config": dict(config or {}),
        "encoder": _encoder_record(component),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }
    record["versions"]["repagen"] = repagen.__version__
    if isinstance(component, ClassToImagePipeline):
        recipe = official.recipe(component.transformer.config)
        record["encoder"] = _encoder_record(component.vae)
        record["autoencoder"] = dict(vae or {})
        record["guidance_model"] = guidance_model and {"name": guidance_model.name, **file_digest(guidance_model)}
        record["sampler"] = {
            "preset": recipe.preset,
            "shift": component.scheduler.config.get("shift"),
            "source": recipe.source,
            **component.config["sampling_defaults"],
        }
    if batch_norm is not None and batch_norm.num_batches_tracked is not None:
        record[_LATENT_BATCHES] = int(batch_norm.num_batches_tracked)
    return record


def read_record(name: str) -> dict[str, Any] | None:
    """Read the record of a converted model; None where this command did not write it.

    Args:
        name: folder or Hub id.

    Raises:
        UserError: a record that cannot be read.
    """
    path = Path(name) / RECORD
    with refusing(f"{path}: cannot be read"):
        if not Path(name).is_dir():
            try:
                path = Path(hf_hub_download(name, RECORD))
            except EntryNotFoundError:
                return None
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _encoder_record(autoencoder: Any) -> dict[str, Any] | None:
    """Name and licence of the encoder that an autoencoder's latents come from."""
    spec = getattr(getattr(autoencoder, "config", None), "encoder", None)
    if not spec:
        return None
    name = spec.get("name_or_path")
    if name and not spec.get("revision"):  # a folder, whose place means nothing elsewhere
        name = Path(name).name
    return {"name": name, "family": spec["family"], "licence": FAMILIES[spec["family"]].licence}


def write_folder(folder: Path, model: Any, record: Mapping[str, Any]) -> None:
    """Write a pipeline or an autoencoder with its model card and record, whole or not at all.

    Args:
        folder: replaced if it is there.
        model: has `save_pretrained`.
        record: of `record_of`.
    """

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary)
        written = dict(record)
        if record["encoder"]:
            written["encoder"] = {**record["encoder"], "stored": any(temporary.rglob(SUBFOLDER))}
        (temporary / RECORD).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(model_card(folder.name, written), encoding="utf-8")

    replace_folder(folder, fill)


def model_card(name: str, record: Mapping[str, Any]) -> str:
    """A model card with the Hub's front matter.

    Args:
        name: of the model.
        record: of `record_of`.
    """
    official = OFFICIAL_FAMILIES[record["family"]]
    is_pipeline = "sampler" in record
    closed = _closed_encoder(record)
    front_matter = ModelCardData(
        library_name="repagen",
        license="other" if closed else official.licence,
        license_name="mixed" if closed else None,
        pipeline_tag="unconditional-image-generation" if is_pipeline else None,
        tags=["diffusers", "repagen", record["family"], "class-conditional" if is_pipeline else "autoencoder"],
    ).to_yaml()
    title = f"# {name}\n\n{official.title} ([{official.paper}]({record['paper']})), converted by repagen"
    sections = [f"---\n{front_matter}\n---", f"{title} from an official checkpoint.", _facts(official, record)]
    sections.append((_PIPELINE_USE if is_pipeline else _AUTOENCODER_USE).replace("{repository}", PLACEHOLDER))
    return "\n\n".join(sections) + "\n"


_PIPELINE_USE = """## Use

```python
import repagen  # registers its classes with diffusers; no trust_remote_code
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}")
image = pipe(class_labels=[0]).images[0]  # sampler, steps and guidance of the table unless given
```"""

_AUTOENCODER_USE = """## Use

```python
import repagen  # registers its classes with diffusers; no trust_remote_code
from diffusers import AutoModel

autoencoder = AutoModel.from_pretrained("{repository}")
images = repagen.latents_to_images(autoencoder, latents)
```"""


def _closed_encoder(record: Mapping[str, Any]) -> bool:
    """Whether the folder holds an encoder's weights that may not be passed on."""
    encoder = record["encoder"]
    return bool(encoder and encoder["stored"] and not FAMILIES[encoder["family"]].redistributable)


def _facts(official: OfficialFamily, record: Mapping[str, Any]) -> str:
    unstated = "none is known; ask its authors" if official.licence == "unknown" else official.licence
    rows = {
        "official code": official.source,
        "licence": unstated,
        "file": f"{record['checkpoint']['name']}, sha256 {record['checkpoint']['sha256']}",
        "outputs": "as the official code's" if official.compared else "not compared with official outputs",
    }
    if record["encoder"]:
        stored = ", inside" if record["encoder"]["stored"] else ", not inside"
        passing = "; its licence does not let this folder be passed on" if _closed_encoder(record) else ""
        name = record["encoder"]["name"] or record["encoder"]["family"]
        rows["encoder"] = f"{name} ({record['encoder']['licence']}){stored}{passing}"
    if "sampler" in record:
        shown = {key: value for key, value in record["sampler"].items() if key != "source"}
        rows["autoencoder"] = (
            f"{record['autoencoder'].get('name')} ({record['autoencoder'].get('licence', 'see there')})"
        )
        rows["sampler"] = ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
        rows["sampler's source"] = record["sampler"]["source"]
        if record["guidance_model"]:
            rows["guidance model"] = record["guidance_model"]["name"]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())])

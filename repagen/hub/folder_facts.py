"""What a saved folder says about itself: the facts of a model card that need no training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repagen.errors import UserError
from repagen.hub.card import CardFacts, CardKind, LicenceFact, class_to_ask_for, without_local_paths

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
PIPELINE_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler_config.json"
_PIPELINES = ("ClassToImagePipeline", "TextToImagePipeline")
_SCHEDULERS = (
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchEulerTruncatedScheduler",
    "FlowMatchHeunScheduler",
)
_PROMPT = "a picture of a cat"
_ONE_SIDED = "What it draws is as one-sided as the images it was trained on; nothing filters it."


def facts_of_folder(folder: Path, licences: Sequence[LicenceFact] = ()) -> CardFacts:
    """Read what kind of thing a folder holds and what its configs say.

    Args:
        folder: as `save_pretrained` or `save_lora_weights` wrote it.
        licences: of its parts, which its files do not say.

    Raises:
        UserError: it holds nothing that can be published, or a config cannot be read.
    """
    if (folder / PIPELINE_FILE).is_file():
        return _pipeline_facts(folder, licences)
    if (folder / "config.json").is_file():
        return _model_facts(folder, licences)
    if (folder / ADAPTER_FILE).is_file():
        return _adapter_facts(folder)
    if (folder / SCHEDULER_FILE).is_file():
        return _scheduler_facts(folder)
    raise UserError(
        f"{folder}: holds neither {PIPELINE_FILE} nor config.json nor {ADAPTER_FILE} nor {SCHEDULER_FILE}; give the "
        "folder of a saved pipeline, autoencoder, transformer, adapter or scheduler"
    )


def pipeline_class(index: Path) -> Any:
    """Return the class that a pipeline's index names; of a pipeline with its own code that of its code."""
    kind = _read(index).get("_class_name")
    return kind[-1] if isinstance(kind, list) and kind else kind


def carries_code(folder: Path) -> bool:
    """Whether a folder holds a pipeline with its own code, as `repagen export --remote-code` writes it."""
    if not (folder / PIPELINE_FILE).is_file():
        return False
    kind = _read(folder / PIPELINE_FILE).get("_class_name")
    return isinstance(kind, list) and bool(kind) and kind[-1] in _PIPELINES


def _text_pipeline_facts(folder: Path, parts: Mapping[str, str], licences: Sequence[LicenceFact]) -> CardFacts:
    autoencoder = _config(folder / "vae")
    return CardFacts(
        kind="text_to_image",
        class_name="TextToImagePipeline",
        summary="Draws images of prompts in the latents of an autoencoder: a diffusers pipeline of repagen.",
        parts={**parts, **{name: text for name in ("text_encoder",) if (text := _part(folder / name))}},
        prompt=_PROMPT,
        tags=("text-to-image",),
        licences=licences or (*_unstated_encoders(autoencoder), *_unstated_encoders(_config(folder / "text_encoder"))),
        encoder_outside=_encoder_outside(autoencoder),
        limits=(_ONE_SIDED,),
    )


def _pipeline_facts(folder: Path, licences: Sequence[LicenceFact]) -> CardFacts:
    index = _read(folder / PIPELINE_FILE)
    parts = {name: _part(folder / name) for name in ("transformer", "guidance_transformer", "vae", "scheduler")}
    defaults = {key: value for key, value in (index.get("sampling_defaults") or {}).items() if value is not None}
    if defaults:
        parts["sampling"] = ", ".join(f"{key} {value}" for key, value in defaults.items())
    parts = {name: text for name, text in parts.items() if text}
    kind = index.get("_class_name")
    kind = kind[-1] if kind and carries_code(folder) else kind
    if kind == "TextToImagePipeline":
        return _text_pipeline_facts(folder, parts, licences)
    if kind != "ClassToImagePipeline":
        raise _unknown_class(index, folder / PIPELINE_FILE)
    transformer = _config(folder / "transformer")
    autoencoder = _config(folder / "vae")
    num_classes = transformer.get("num_classes", 0)
    id2label = index.get("id2label") or {}
    names = [name for _, name in sorted(id2label.items(), key=lambda entry: int(entry[0]))]
    of_classes = f"images of {num_classes} classes" if num_classes else "images"
    return CardFacts(
        kind="class_to_image",
        class_name="ClassToImagePipeline",
        summary=f"Draws {of_classes} in the latents of an autoencoder: a diffusers pipeline of repagen.",
        parts=parts,
        class_names=names,
        num_classes=num_classes,
        example=class_to_ask_for(names),
        tags=("class-conditional",) if num_classes else (),
        licences=licences or _unstated_encoders(autoencoder),
        encoder_outside=_encoder_outside(autoencoder),
        limits=_class_limits(num_classes),
    )


def _model_facts(folder: Path, licences: Sequence[LicenceFact]) -> CardFacts:
    config = _config(folder)
    name = str(config.get("_class_name"))
    if name == "TextEncoder":
        return CardFacts(
            kind="part",
            class_name=name,
            summary="Reads prompts for text-to-image generators of repagen.",
            parts={"text encoder": _part(folder)},
            num_classes=None,
            tags=("text-encoder",),
            licences=licences or _unstated_encoders(config),
        )
    kind: CardKind = "autoencoder" if "Autoencoder" in name else "transformer"
    if not name.endswith(("Autoencoder", "Transformer2DModel", "AutoencoderKL")):
        raise _unknown_class(config, folder / "config.json")
    summary = {
        "autoencoder": "An autoencoder for image generators in its latents, of",
        "transformer": "A generator in the latents of an autoencoder, of",
    }[kind]
    outside = _encoder_outside(config)
    takes_text = bool(config.get("text_dim"))
    classes = _class_limits(config["num_classes"]) if "num_classes" in config else ()
    return CardFacts(
        kind=kind,
        class_name=name,
        library="diffusers" if name == "AutoencoderKL" else "repagen",
        summary=f"{summary} repagen.",
        parts={kind: _part(folder)},
        num_classes=config.get("num_classes", 0),
        prompt=_PROMPT if takes_text else None,
        tags=("autoencoder" if kind == "autoencoder" else "generator",),
        licences=licences or _unstated_encoders(config),
        encoder_outside=outside,
        limits=(_ONE_SIDED,) if takes_text else classes,
    )


def _scheduler_facts(folder: Path) -> CardFacts:
    config = _read(folder / SCHEDULER_FILE)
    name = str(config.get("_class_name"))
    if name not in _SCHEDULERS:
        raise _unknown_class(config, folder / SCHEDULER_FILE)
    settings = {key: str(value) for key, value in config.items() if not key.startswith("_")}
    return CardFacts(
        kind="part",
        class_name=name,
        summary="A sampler for generators of repagen and other flow-matching models: settings, without weights.",
        parts=settings,
        num_classes=None,
        tags=("scheduler",),
    )


def _adapter_facts(folder: Path) -> CardFacts:
    from safetensors import safe_open

    try:
        with safe_open(folder / ADAPTER_FILE, framework="np") as file:
            header = file.metadata() or {}
            names = [str(name) for name in json.loads(header.get("class_names") or "[]")]
            has_layers = any(".lora_" in key for key in file.keys())  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{folder / ADAPTER_FILE}: cannot be read as safetensors ({error})") from error
    held = ["LoRA layers of its generator"] if has_layers else []
    held += [f"label rows of {_new_classes(len(names))}"] if names else []
    alone = "" if has_layers else "; the generator and its own classes stay as they are"
    takes_text = header.get("pipeline") == "TextToImagePipeline"
    return CardFacts(
        kind="adapter",
        class_name="TextToImagePipeline" if takes_text else "ClassToImagePipeline",
        summary=f"An adapter for a pipeline of repagen: {' and '.join(held)}{alone}.",
        parts={"adapter": _size(folder)},
        class_names=names,
        num_classes=len(names) or None,
        prompt=_PROMPT if takes_text else None,
        example=class_to_ask_for(names),
        tags=("adapter", "lora") if has_layers else ("adapter",),
    )


def _new_classes(count: int) -> str:
    return f"{count} new class" + ("es" if count > 1 else "")


def _class_limits(num_classes: int) -> tuple[str, ...]:
    known = f"It knows its {num_classes} classes and nothing else; it takes no text." if num_classes else (
        "It draws without being asked for anything in particular."
    )  # fmt: skip
    return (known, _ONE_SIDED)


def _unstated_encoders(config: Mapping[str, Any]) -> tuple[LicenceFact, ...]:
    """The encoders, of images or texts, that a component's config names, where nobody said their licences."""
    named = [("encoder", encoder) for encoder in [config.get("encoder")] if encoder]
    named += [("text encoder", encoder) for encoder in config.get("encoders") or ()]
    return tuple(
        LicenceFact(
            part=part,
            name=str(without_local_paths(encoder.get("name_or_path") or encoder.get("family"))),
            licence="unknown here",
            consequence="see the encoder's own card",
        )
        for part, encoder in named
    )


def _encoder_outside(config: Mapping[str, Any]) -> bool:
    return bool(config.get("encoder")) and not config.get("encoder_stored")


def _part(folder: Path) -> str:
    """Class and size of a component; empty where there is none."""
    if not folder.is_dir():
        return ""
    name = _config(folder).get("_class_name", "unknown class")
    return f"{name}, {_size(folder)}" if any(folder.rglob("*.safetensors")) else str(name)


def _size(folder: Path) -> str:
    total = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return f"{total / 1e6:.3g} MB of weights"


def _config(folder: Path) -> dict[str, Any]:
    name = next((name for name in ("config.json", SCHEDULER_FILE) if (folder / name).is_file()), None)
    return _read(folder / name) if name else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _unknown_class(config: Mapping[str, Any], path: Path) -> UserError:
    return UserError(
        f"{path}: holds a {config.get('_class_name')}; published are ClassToImagePipeline, TextToImagePipeline, "
        "autoencoders, transformers, text encoders and schedulers of repagen, AutoencoderKL, and LoRA adapters"
    )

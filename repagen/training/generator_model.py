"""The network of a generator's training: new with the published initial weights, or a pretrained one to go on from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from repagen.data import SampleDataset
from repagen.errors import UserError
from repagen.models.identity import describe_autoencoder
from repagen.models.latents import require_sizes
from repagen.models.opening import component_config, component_place, open_component, pinned_revision
from repagen.randomness import derived_seed
from repagen.training.generator_config import (
    ARCHITECTURES,
    GeneratorRunConfig,
    NewGeneratorConfig,
    TransformerConfig,
)


def build_model(
    config: NewGeneratorConfig,
    latent_shape: tuple[int, int, int],
    conditions: Mapping[str, Any],
    class_token_dim: int = 0,
) -> Any:
    """The generator; weights that are drawn depend on the seed alone.

    Args:
        config: names the network.
        latent_shape: (C, h, w).
        conditions: constructor arguments that say what the network is conditioned on, see `Conditioning`.
        class_token_dim: width of the class token that is denoised too (REG); 0: none.

    Raises:
        UserError: the sizes do not fit together, or contradict those of the pretrained network; or a setting has no
            effect on this network.
    """
    torch.manual_seed(derived_seed(config.seed, "generator weights"))
    more = {"class_token_dim": class_token_dim} if class_token_dim else {}
    make = _new_model if config.transformer.pretrained is None else _pretrained_model
    model = make(config, latent_shape, conditions, more)
    refuse_idle_settings(config, model)
    return model


def refuse_sizes(
    config: GeneratorRunConfig,
    dataset: SampleDataset,
    autoencoder: Any,
    model: Any,
    latent_shape: tuple[int, int, int],
) -> None:
    """Refuse images or latents of several sizes that autoencoder or network do not take; see also `FrozenParts`.

    Args:
        config: of the training.
        dataset: of the training.
        autoencoder: of the latents.
        model: the generator.
        latent_shape: (C, h, w) of `data.image_size`.

    Raises:
        UserError: that names the key.
    """
    sizes = dataset.bucket_sizes
    if not sizes:
        return
    if not model.any_size:
        raise UserError(
            f"data.buckets: {type(model).__name__} takes latents of {latent_shape[1]}x{latent_shape[2]} alone; leave "
            "it out, or take a network that takes text"
        )
    pixels = 1 if config.data.kind == "latents" else config.data.image_size // latent_shape[1]
    if pixels > 1:
        require_sizes(autoencoder, sizes, "data.buckets")
    side = pixels * model.config.patch_size
    for height, width in sizes:
        if height % side or width % side:
            raise UserError(
                f"data.buckets: {height}x{width} is no multiple of the {side} that a token of the network takes; set "
                f"data.bucket_step={side}"
            )


def refuse_idle_settings(config: GeneratorRunConfig, model: Any) -> None:
    """Refuse what was set to other than its default although this network's training takes no notice of it.

    Raises:
        UserError: that names the key.
    """
    discrete = model.discrete_time
    idle: dict[str, tuple[Any, list[str], str]] = {
        "flow": (config.flow, [field.name for field in fields(config.flow)] if discrete else [], "takes DDPM's steps"),
        "loss": (
            config.loss,
            [
                *(["direction"] if discrete else []),
                *([] if model.has_base_head else ["base"]),
                *([] if (model.config.get("num_loops") or 1) > 1 else ["distillation"]),
                *([] if discrete and model.config.learn_sigma else ["variational_bound"]),
            ],
            "has no such loss",
        ),
    }
    for section, (given, names, reason) in idle.items():
        for name in names:
            value, default = getattr(given, name), getattr(type(given)(), name)
            if value != default:
                raise UserError(
                    f"{section}.{name}: {value} has no effect, {type(model).__name__} {reason}; leave it out, or set "
                    f"it to {default}"
                )


def _new_model(
    config: NewGeneratorConfig, latent_shape: tuple[int, int, int], conditions: Mapping[str, Any], more: dict[str, Any]
) -> Any:
    transformer, (channels, height, width) = config.transformer, latent_shape
    _require_arguments(transformer.model_class, {**conditions, **more})
    arguments = {
        **transformer.model_class.config_for_size(transformer.size or "S", **transformer.overrides),
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "patch_size": transformer.patch_size or 1,
        **conditions,
        **({"prediction_type": transformer.prediction} if transformer.prediction else {}),
        **more,
    }
    try:
        model = transformer.model_class(**arguments)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{_keys_of(str(error), arguments)}: {error}") from None
    model.initialize_weights()
    return model


def _keys_of(message: str, arguments: Mapping[str, Any]) -> str:
    """The keys of the constructor arguments that a refusal names, or else whose width or head width it tells."""
    words = set(re.findall(r"\w+", message))
    names = [name for name in arguments if name in words]
    for prefix in ("", "head_"):
        width, heads = arguments.get(f"{prefix}hidden_size"), arguments.get(f"{prefix}num_heads")
        if not names and width and heads and words & {str(width), str(width // heads)}:
            names = [f"{prefix}hidden_size", f"{prefix}num_heads"]
    known = {
        name: "transformer.patch_size" if name == "patch_size" else f"transformer.overrides.{name}" for name in names
    }
    return ", ".join(known.values()) or "transformer"


def _require_arguments(model_class: Any, more: Mapping[str, Any]) -> None:
    """Refuse what a network does not take: a class token, or text."""
    unknown = more.keys() - inspect.signature(model_class.__init__).parameters.keys()
    if "text_dim" in unknown:
        allowed = [name for name in ARCHITECTURES if "text_dim" in _parameters(ARCHITECTURES[name])]
        raise UserError(
            f"transformer.architecture: {model_class.__name__} takes no text; allowed: {', '.join(allowed)}"
        )
    if unknown:
        raise UserError(
            f"alignment.class_token: {model_class.__name__} takes no class token; set transformer.architecture=sit"
        )


def _parameters(class_name: str) -> Mapping[str, Any]:
    """Constructor parameters of a public class, by name."""
    import repagen

    return inspect.signature(getattr(repagen, class_name).__init__).parameters


def token_grid(transformer: TransformerConfig, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Rows and columns of the generator's tokens; of a pretrained network only the configuration is read.

    Raises:
        UserError: if the patch does not divide the latent.
    """
    patch_size = transformer.patch_size or 1
    if transformer.pretrained is not None:
        name = transformer.pretrained
        stored = component_config(name, "transformer", "transformer.pretrained", transformer.revision)
        _require_generator(name, str(stored.get("_class_name")))
        patch_size = int(stored["patch_size"])
    _, height, width = latent_shape
    if height % patch_size or width % patch_size:
        raise UserError(
            f"transformer.patch_size: the latent is {height}x{width}, which patches of {patch_size} do not divide; "
            "choose a divisor, or another autoencoder or data.image_size"
        )
    return height // patch_size, width // patch_size


# --- going on from a pretrained network ----------------------------------------------------------------------------


def pinned_pretrained(transformer: TransformerConfig) -> str | None:
    """Return the commit of the pretrained network on the Hub, which is opened more than once; None without one.

    Raises:
        UserError: it cannot be reached.
    """
    name = transformer.pretrained
    return (
        None if name is None else pinned_revision(name, "transformer", "transformer.pretrained", transformer.revision)
    )


def open_transformer(name: str, revision: str | None = None) -> Any:
    """Load a generator of this library from a folder or the Hub: a pipeline's, or one on its own.

    Raises:
        UserError: nothing that can be loaded is there, or a model of another kind.
    """
    model = open_component(name, "transformer", "transformer.pretrained", revision)
    _require_generator(name, type(model).__name__)
    return model.float().train()


def _require_generator(name: str, class_name: str) -> None:
    if class_name not in ARCHITECTURES.values():
        allowed = ", ".join(ARCHITECTURES.values())
        raise UserError(
            f"transformer.pretrained: {name} is a {class_name}; allowed: {allowed}, or a pipeline with one of them"
        )


def refuse_label_dropout(label_dropout: float, model: Any, num_classes: int, name: str) -> None:
    """Refuse to drop labels for a generator without a null class.

    Args:
        label_dropout: share of the labels.
        model: the generator.
        num_classes: of the training; 0 = unconditional.
        name: what the user gave the generator as.

    Raises:
        UserError: there would be no label to take their place.
    """
    if num_classes and label_dropout and not model.config.class_dropout_prob:
        raise UserError(f"label_dropout: {label_dropout}, but {name} has no null class; set it to 0")


def refuse_other_autoencoder(config: NewGeneratorConfig, fingerprint: Mapping[str, Any]) -> None:
    """Compare the latents of a pretrained pipeline with those of the training.

    Args:
        config: names the pretrained network and the autoencoder.
        fingerprint: of the autoencoder, by `describe_autoencoder`.

    Raises:
        UserError: the pipeline holds an autoencoder with other latents.
    """
    name, revision = config.transformer.pretrained, config.transformer.revision
    if name is None or component_place(name, "vae", "transformer.pretrained", revision)["subfolder"] is None:
        return
    own = describe_autoencoder(open_component(name, "vae", "transformer.pretrained", revision))
    other = [key for key in ("class", "encoder", "statistics") if own[key] != fingerprint[key]]
    if other:
        raise UserError(
            f"autoencoder.path: {config.autoencoder.path} has other latents than the vae of {name} (another "
            f"{', '.join(other)}); set autoencoder.path={name} and autoencoder.subfolder=vae, or "
            f"transformer.pretrained={name}/transformer to go on in other latents"
        )


def _pretrained_model(
    config: NewGeneratorConfig, latent_shape: tuple[int, int, int], conditions: Mapping[str, Any], more: dict[str, Any]
) -> Any:
    transformer = config.transformer
    model = open_transformer(str(transformer.pretrained), transformer.revision)
    _require_arguments(type(model), {**conditions, **more})
    if "text_dim" in conditions:
        model = _reading_text(model, conditions, transformer)
    _refuse_contradictions(model, transformer)
    _refuse_other_latents(model, latent_shape)
    changes = {key: value for key, value in more.items() if model.config.get(key) != value}
    if "text_dim" not in conditions:
        changes |= _class_changes(model, conditions, transformer)
    return model.rebuilt(**changes).float().train() if changes else model


def _class_changes(model: Any, conditions: Mapping[str, Any], transformer: TransformerConfig) -> dict[str, Any]:
    """Constructor arguments that must change so that a pretrained network takes the classes of the data."""
    num_classes, changes = conditions["num_classes"], {}
    if model.takes_text:
        raise UserError(
            f"transformer.pretrained: {transformer.pretrained} takes text; go on with it in text-to-image training, "
            "-m repagen.training.text_to_image"
        )
    if num_classes != model.config.num_classes:
        if not transformer.new_classes:
            raise UserError(
                f"transformer.pretrained: has {model.config.num_classes} classes, the dataset {num_classes}; set "
                "transformer.new_classes=true to draw the class embeddings anew, or choose data with its classes"
            )
        changes["num_classes"] = num_classes
    refuse_label_dropout(conditions["class_dropout_prob"], model, num_classes, str(transformer.pretrained))
    return changes


def _reading_text(model: Any, conditions: Mapping[str, Any], transformer: TransformerConfig) -> Any:
    """A pretrained network that takes the embeddings of the text encoder; one with classes learns to read them."""
    width, share = conditions["text_dim"], conditions["text_dropout_prob"]
    if not model.takes_text:
        kind = transformer.overrides.get("text_conditioning", model.config.text_conditioning)
        return model.to_text_conditional(width, kind, share).float().train()
    if model.config.text_dim != width:
        raise UserError(
            f"text.encoder: gives embeddings of width {width}, but {transformer.pretrained} takes "
            f"{model.config.text_dim}; name the text encoder that it was trained with, or leave out "
            "transformer.pretrained"
        )
    return model if model.config.text_dropout_prob == share else model.rebuilt(text_dropout_prob=share).float().train()


def _refuse_contradictions(model: Any, transformer: TransformerConfig) -> None:
    """Compare what the configuration sets with what the pretrained network has."""
    given: dict[str, tuple[str, Any]] = {}
    if transformer.architecture is not None:
        expected, own = ARCHITECTURES[transformer.architecture], type(model).__name__
        if expected != own:
            raise UserError(
                f"transformer.architecture: {transformer.architecture} ({expected}), but {transformer.pretrained} is "
                f"a {own}; leave it out"
            )
        size = transformer.model_class.config_for_size(transformer.size) if transformer.size else {}
        given |= {name: ("size", value) for name, value in size.items()}
    given |= {name: (f"overrides.{name}", value) for name, value in transformer.overrides.items()}
    if transformer.patch_size is not None:
        given["patch_size"] = ("patch_size", transformer.patch_size)
    if transformer.prediction is not None:
        given["prediction_type"] = ("prediction", transformer.prediction)
    for name, (key, value) in given.items():
        if name not in model.config:
            known = ", ".join(n for n in inspect.signature(type(model).__init__).parameters if n != "self")
            raise UserError(f"transformer.{key}: unknown; known: {known}")
        own = model.config[name]
        if (list(own) if isinstance(own, tuple) else own) != value:
            raise UserError(
                f"transformer.{key}: asks for {name}={value!r}, but {transformer.pretrained} has {own!r}; leave it "
                "out, or train a new network without transformer.pretrained"
            )


def _refuse_other_latents(model: Any, latent_shape: tuple[int, int, int]) -> None:
    if model.latent_shape != tuple(latent_shape):
        raise UserError(
            f"transformer.pretrained: generates latents of shape {model.latent_shape}, but the autoencoder's have "
            f"{tuple(latent_shape)}; set autoencoder.path and data.image_size to those it was trained with"
        )

"""Encoder weights from files, with everything that does not fit refused by name."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from repagen.encoders.backbones import (
    FROZEN_VARIANT,
    Backbone,
    TimmBackbone,
    TransformersBackbone,
    build_timm,
    quiet_transformers,
    transformers_config,
)
from repagen.encoders.families import EncoderFamily, TransformersFamily
from repagen.errors import UserError
from repagen.hub.inspection import inspect_encoder_folder
from repagen.hub.network_size import refuse_oversized

_UNREADABLE = (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError)


def load_weights(family: EncoderFamily, description: Mapping[str, Any], weights: Path, name: str) -> Backbone:
    """Build an encoder's network and fill it from its weights file.

    Args:
        family: its row of the table.
        description: the content of its config.
        weights: path of the weights file or its index, in the encoder's folder.
        name: the encoder, for messages.

    Raises:
        UserError: for weights that are missing, misshapen or not finite.
    """
    if family.name == "timm":
        backbone: Backbone = _load_timm(description, weights, name)
    else:
        backbone = _load_transformers(family, description, weights, name)
    refuse_not_finite(backbone.model, weights, name)
    return backbone


def _load_transformers(
    family: EncoderFamily, description: Mapping[str, Any], weights: Path, name: str
) -> TransformersBackbone:
    return TransformersBackbone(family, load_network(family, description, weights, name))


def load_network(
    family: TransformersFamily,
    description: Mapping[str, Any],
    weights: Path,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Build a family's transformers model and fill it from a weights file.

    Args:
        family: its row of a table.
        description: the content of its config.
        weights: path of the weights file or its index.
        name: the encoder, for messages.
        dtype: of the parameters.

    Raises:
        UserError: as `load_pretrained`.
    """
    import transformers

    config = transformers_config(family, description, f"{name}:config.json")
    model_class = getattr(transformers, family.model_class)
    refuse_oversized(lambda: model_class(config, **family.constructor), weights.parent, f"{name}:config.json")
    variant = FROZEN_VARIANT if weights.name == f"model.{FROZEN_VARIANT}.safetensors" else None
    mapping = {f"^{family.tower_prefix}": ""} if family.tower_prefix else None
    return load_pretrained(
        model_class, weights, name,
        dtype=dtype, config=config, variant=variant, key_mapping=mapping, **family.constructor,
    )  # fmt: skip


def load_pretrained(
    model_class: Any, weights: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Load a transformers model from the folder of its weights file, offline.

    Args:
        model_class: a class of transformers.
        weights: path of the weights file or its index.
        name: the encoder, for messages.
        dtype: of the parameters.
        options: of `from_pretrained`.

    Raises:
        UserError: for weights that are refused, cannot be read, are missing or misshapen.
    """
    inspect_encoder_folder(weights.parent, f"encoder {name!r}")
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                weights.parent, dtype=dtype, local_files_only=True, use_safetensors=weights.suffix != ".bin",
                ignore_mismatched_sizes=True, output_loading_info=True, **options,
            )  # fmt: skip
    except _UNREADABLE as error:
        raise _unreadable(weights, name, error) from error
    if mismatched := sorted(report["mismatched_keys"]):
        key, given, needed = mismatched[0]
        raise UserError(f"{weights}:{key}: shape {tuple(given)} does not fit the config, which needs {tuple(needed)}")
    refuse_missing(report["missing_keys"], weights)
    return model


def _load_timm(description: Mapping[str, Any], weights: Path, name: str) -> TimmBackbone:
    from timm.models import load_state_dict

    inspect_encoder_folder(weights.parent, f"encoder {name!r}")
    where = f"{name}:config.json"
    refuse_oversized(lambda: build_timm(description, where), weights.parent, where)
    backbone = build_timm(description, where)
    try:
        state = load_state_dict(str(weights), use_ema=False, weights_only=True)
    except _UNREADABLE as error:
        raise _unreadable(weights, name, error) from error
    own = backbone.model.state_dict()
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            given, needed = tuple(state[key].shape), tuple(value.shape)
            raise UserError(f"{weights}:{key}: shape {given} does not fit the config, which needs {needed}")
    refuse_missing(own.keys() - state.keys(), weights)
    nn.Module.load_state_dict(backbone.model, {key: state[key].float() for key in own})
    return backbone


def _unreadable(weights: Path, name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    if isinstance(error, UnpicklingError):  # torch's advice is to read the file without `weights_only`, running it
        reason = "it holds more than tensors, or is damaged; use a copy in safetensors"
    return UserError(f"{weights}: encoder {name!r} cannot be read: {reason}")


def refuse_missing(keys: Any, weights: Path) -> None:
    """Refuse a file that lacks tensors, naming the first and their number."""
    if missing := sorted(keys):
        raise UserError(f"{weights}: {len(missing)} tensors are missing, the first is {missing[0]}")


def refuse_not_finite(model: nn.Module, weights: Path, name: str) -> None:
    """Refuse weights with an infinity or NaN, naming the first tensor."""
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{weights}:{key}: not finite; the file of encoder {name!r} is damaged, fetch it again")


def constituents(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor itself, or what a quantised one of torchao consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from constituents(getattr(tensor, name))


def weights_sha256(model: nn.Module) -> str:
    """Hash a model's weights: the same for float32 and bfloat16 copies and for any tensor names."""
    digests = []
    for value in itertools.chain.from_iterable(map(constituents, model.state_dict().values())):
        rounded = value.detach().cpu().to(torch.bfloat16).contiguous()
        content = rounded.flatten().view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(f"{tuple(value.shape)}".encode() + content).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()

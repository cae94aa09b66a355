"""How a text encoder is saved in a pipeline's folder: whole, or by Hub id and commit."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from repagen.encoders.files import require_pinned
from repagen.encoders.spec import TextEncoderSpec
from repagen.encoders.text_tower import (
    TextTower,
    from_end,
    label,
    load_tokenizer,
    load_tower,
    text_family,
    tokenizer_sha256,
    tower_config,
)
from repagen.errors import UserError
from repagen.hub.fetching import complete_snapshot
from repagen.hub.saved_models import inspected_source
from repagen.hub.whole_models import WholeModelMixin

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.{}"
"""Sub-folder of each encoder's tokenizer; a name without a dot breaks diffusers' search for variants."""


class StoredTextEncoder(WholeModelMixin):
    """The part of `TextEncoder` that loads and saves.

    The folder holds `config.json` and, where the weights are saved along, `diffusion_pytorch_model*.safetensors` of
    all encoders and a sub-folder `tokenizer.0`, `tokenizer.1` ... of each one's tokenizer.
    """

    config: Any
    towers: nn.ModuleList
    device: torch.device
    dtype: torch.dtype
    register_to_config: Callable[..., None]
    save_config: Callable[..., None]
    _specs: list[TextEncoderSpec]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see `ModelMixin.from_pretrained`.

        Encoders that are saved by reference wait for the first `encode`.

        Raises:
            UserError: a folder that is refused or incomplete.
        """
        root = inspected_source(
            pretrained_model_name_or_path, cls.__name__, kwargs, extra=(f"{TOKENIZER.format('*')}/*",), weights=False
        )
        folder = root / (kwargs.get("subfolder") or "")
        config: Any = cls.load_config(folder)  # type: ignore[attr-defined]
        if config.get("encoders_stored", True):
            result = super().from_pretrained(root, **kwargs)
        else:
            model = cls.from_config(config)  # type: ignore[attr-defined]
            place = kwargs.get("device_map")
            device = place.get("", "cpu") if isinstance(place, Mapping) else place
            model.placement = model.placement.to(device, _dtype(kwargs))
            result = (model, _NOTHING_ODD) if kwargs.get("output_loading_info") else model
        model = result[0] if isinstance(result, tuple) else result
        model.register_to_config(_name_or_path=os.fspath(pretrained_model_name_or_path))
        model.requires_grad_(False)
        for index, tower in enumerate(model._loaded()):
            tower.tokenizer = _stored_tokenizer(folder, index, tower.spec)
        return result

    def load(self) -> None:
        """Load or fetch, now, the encoders that are saved by reference, if this has not been done.

        Raises:
            UserError: they cannot be had, are others than those that were saved, or are not named by their commit and
                hashes.
        """
        if len(self.towers) == len(self._specs):
            return
        towers = []
        for spec in self._specs:
            name = _pinned_name(spec)
            reading = {"hidden_layer": spec.hidden_layer, "max_length": spec.max_length, "template": spec.template}
            tower = load_tower(name, revision=spec.revision, dtype=self.dtype, **reading)  # type: ignore[arg-type]
            _refuse_other(spec, tower)
            towers.append(tower.to(self.device))
        self.towers = nn.ModuleList(towers)

    def describe(self) -> list[dict[str, Any]]:
        """Return {name, weights, tokenizer (hashes), hidden_layer, max_length, template} of each encoder, JSON-able.

        Encoders of equal descriptions, but for names, give equal embeddings (in the same dtype). A layer is counted
        from the end, whichever way it was given. Nothing is fetched for it.
        """
        return [
            {
                "name": spec.name_or_path or spec.family,
                "weights": spec.weights,
                "tokenizer": spec.tokenizer,
                "hidden_layer": from_end(spec.hidden_layer, tower_config(spec)),
                "max_length": spec.max_length,
                "template": spec.template,
            }
            for spec in self._hashed_specs()
        ]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        include_encoder: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the encoders, or a reference to them.

        Args:
            save_directory: the folder.
            is_main_process, args, kwargs: see `ModelMixin.save_pretrained`.
            include_encoder: save weights and tokenizers too, or only where they come from. By default they are saved
                if the licences of all of them allow it or they come from nowhere (random weights); encoders that have
                not been loaded are saved as they were found.

        Raises:
            UserError: if the encoders shall be saved and cannot be loaded, or come from nowhere and shall not.
        """
        stored = self._shall_store(include_encoder)
        if stored:
            self.load()
        specs = [_saved_spec(spec, stored) for spec in self._hashed_specs()]
        self.register_to_config(encoders=[dataclasses.asdict(spec) for spec in specs], encoders_stored=stored)
        if not stored:
            if is_main_process:
                self.save_config(save_directory)
            return
        for index, tower in enumerate(self._loaded()):
            if is_main_process and tower.tokenizer is not None:
                tower.tokenizer.save_pretrained(Path(save_directory) / TOKENIZER.format(index))
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _loaded(self) -> list[TextTower]:
        return cast(list[TextTower], list(self.towers))

    def _shall_store(self, asked: bool | None) -> bool:
        if asked is not None:
            return asked
        if any(spec.name_or_path is None for spec in self._specs):
            return True
        if not len(self.towers):
            return False
        return all(text_family(spec).redistributable for spec in self._specs)

    def _hashed_specs(self) -> list[TextEncoderSpec]:
        """The specs with the hashes of what is loaded; as they were saved where nothing is."""
        if len(self.towers) != len(self._specs):
            return self._specs
        return [
            dataclasses.replace(
                spec,
                weights=tower.fingerprint(),
                tokenizer=spec.tokenizer if tower.tokenizer is None else tokenizer_sha256(tower.tokenizer),
            )
            for spec, tower in zip(self._specs, self._loaded(), strict=True)
        ]


def unlike(there: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]) -> str | None:
    """Say what first differs between two `StoredTextEncoder.describe()`, but for names; None: nothing does.

    Args:
        there, here: the words that tell which is which.
    """
    if len(there) != len(here):
        return f"{len(there)} encoders there, {len(here)} here"
    differences = (
        f"{key} {_short(one.get(key))} there, {_short(value)} here"
        for one, other in zip(there, here, strict=True)
        for key, value in other.items()
        if key != "name" and one.get(key) != value
    )
    return next(differences, None)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else repr(value)


_NOTHING_ODD: dict[str, Any] = {
    name: [] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
}


def _dtype(kwargs: Mapping[str, Any]) -> torch.dtype:
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _stored_tokenizer(folder: Path, index: int, spec: TextEncoderSpec) -> Any:
    """Load a saved tokenizer; of a pipeline that diffusers alone downloaded, which leaves it out, fetch it first."""
    place = folder / TOKENIZER.format(index)
    if not place.is_dir():
        complete_snapshot(place, "text encoder of")
    return load_tokenizer(place, spec.name_or_path or spec.family)


def _saved_spec(spec: TextEncoderSpec, stored: bool) -> TextEncoderSpec:
    local = spec.revision is None and spec.name_or_path is not None
    if stored and local:
        # The folder on this machine means nothing elsewhere, and the weights go along.
        return dataclasses.replace(spec, name_or_path=None)
    if not stored and spec.name_or_path is None:
        raise UserError(f"include_encoder=False: text encoder {label(spec)} comes from nowhere; save it too")
    if not stored and local:
        logger.warning(
            "text encoder %s is saved as a reference to a local folder; elsewhere this model reads no prompts "
            "(include_encoder=True saves the weights along, where their licence allows it)",
            label(spec),
        )
    return spec


def _pinned_name(spec: TextEncoderSpec) -> str:
    """The folder or Hub id of an encoder that is saved by reference, which must tell exactly what it refers to."""
    if absent := [key for key in ("name_or_path", "weights", "tokenizer") if not isinstance(getattr(spec, key), str)]:
        raise UserError(
            f"text encoder {label(spec)}: saved as a reference, and config.json lacks its {' and '.join(absent)}; "
            "load the encoder by itself and save this model again"
        )
    name = str(spec.name_or_path)
    require_pinned(name, spec.revision, "text encoder")
    return name


def _refuse_other(spec: TextEncoderSpec, tower: TextTower) -> None:
    given = {"weights": tower.fingerprint(), "tokenizer": tokenizer_sha256(tower.tokenizer)}
    for name, value in given.items():
        expected = getattr(spec, name)
        if value != expected:
            raise UserError(
                f"text encoder {label(spec)} has another fingerprint of its {name} ({value[:12]}) than the one this "
                f"model was saved with ({expected[:12]}); use that one"
            )

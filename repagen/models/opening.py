"""Opening a saved model by folder or Hub id, whether it was saved alone or as a part of a pipeline."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoModel, ConfigMixin

from repagen.errors import UserError, refusing
from repagen.hub.fetching import fetch_snapshot, resolve_commit
from repagen.hub.saved_models import inspected_source

Part = Literal["transformer", "vae", "text_encoder"]


def open_component(name: str, part: Part, option: str, revision: str | None = None) -> Any:
    """Load a generator or an autoencoder, of this library or of diffusers, in eval mode.

    Args:
        name: folder or Hub id of the model alone, or of a pipeline.
        part: which part of a pipeline is meant.
        option: what the user gave the name as, for messages.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: nothing that can be loaded is there.
    """
    place = component_place(name, part, option, revision)
    with refusing(f"{option}: {name} cannot be loaded; allowed: {_allowed(part)}"):
        model = load_model(name, f"{option}: model", **place)
    return model.eval()


def component_place(name: str, part: Part, option: str, revision: str | None = None) -> dict[str, Any]:
    """Where a model is within `name`, as arguments of diffusers' loading functions; arguments as in `open_component`.

    The revision among them is a commit, so that what is loaded is what was looked at.

    Raises:
        UserError: a folder that is not there, or an id that cannot be reached.
    """
    commit = pinned_revision(name, part, option, revision)
    subfolder = part if (_indices(name, option, commit) / "model_index.json").is_file() else None
    return {"subfolder": subfolder, "revision": commit}


def component_config(name: str, part: Part, option: str, revision: str | None = None) -> dict[str, Any]:
    """Read what a saved model says of itself, its class and its arguments; arguments as in `open_component`.

    Raises:
        UserError: there is none that can be read.
    """
    place = component_place(name, part, option, revision)
    with refusing(f"{option}: {name} cannot be loaded"):
        stored: Any = _SavedModel.load_config(name, **place)
    return dict(stored)


class _SavedModel(ConfigMixin):
    """Reads configurations; `AutoModel.load_config` looks for other files once it has opened a part of a pipeline."""

    config_name: Any = "config.json"


def pipeline_parts(name: str, option: str, revision: str | None = None) -> set[str]:
    """Names of the models that a pipeline holds; none where `name` is a model alone. Arguments: `component_place`.

    Raises:
        UserError: a folder that is not there, or an id that cannot be reached.
    """
    entries = pipeline_index(name, option, revision)
    return {key for key, value in entries.items() if isinstance(value, list) and value[0] is not None}


def pipeline_index(name: str, option: str, revision: str | None = None) -> dict[str, Any]:
    """The `model_index.json` of a pipeline; empty where `name` is a model alone. Arguments: `component_place`.

    Raises:
        UserError: a folder that is not there, an id that cannot be reached, or a damaged file.
    """
    index = _indices(name, option, pinned_revision(name, "transformer", option, revision)) / "model_index.json"
    if not index.is_file():
        return {}
    with refusing(f"{option}: {name} cannot be loaded"):
        return dict(json.loads(index.read_text(encoding="utf-8")))


def _indices(name: str, option: str, commit: str | None) -> Path:
    """The folder that holds the small files which say what a saved model or pipeline is."""
    if commit is None:
        return Path(name)
    return fetch_snapshot(name, revision=commit, patterns=["model_index.json", "config.json"], what=f"{option}: model")


def pinned_revision(name: str, part: Part, option: str, revision: str | None = None) -> str | None:
    """Return the commit that a revision of a Hub id means now, None for a folder; arguments as in `open_component`.

    Raises:
        UserError: a folder that is not there, or an id that cannot be reached.
    """
    refuse_missing_folder(name, option, _allowed(part))
    return None if Path(name).is_dir() else resolve_commit(name, revision, what=f"{option}: model")


def load_model(name: str, what: str, **place: Any) -> Any:
    """Load a model of this library or of diffusers.

    Args:
        name: folder or Hub id.
        what: what it is to the user, for messages.
        place: arguments of diffusers' loading functions.

    Raises:
        UserError: it cannot be fetched, or its folder is refused.
    """
    root = inspected_source(name, what, place)
    with warnings.catch_warnings():
        # diffusers' own call, about which the user can do nothing; it would stand before the line about a wrong name.
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
        model = AutoModel.from_pretrained(str(root), **place)
    if isinstance(model, ConfigMixin):
        model.register_to_config(_name_or_path=name)
    return model


def refuse_missing_folder(name: str, option: str, allowed: str) -> None:
    """Refuse a name that is neither a folder nor has the form of a Hub id, before libraries look for it at length.

    Raises:
        UserError: it is such a name.
    """
    if not Path(name).is_dir() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(f"{option}: no such folder: {name}; allowed: {allowed} (an id has the form org/name)")


def refuse_revision_of_folder(name: str, revision: str | None) -> None:
    """Refuse a revision that would be passed over in silence.

    Raises:
        UserError: there is one, and the name is a folder's.
    """
    if revision is not None and Path(name).is_dir():
        raise UserError(
            f"revision {revision!r} was given, but {name} is a folder here, which has no revisions; leave it out, or "
            "name a Hub id"
        )


def _allowed(part: str) -> str:
    return f"a folder or Hub id of a pipeline, or of its {part} alone"

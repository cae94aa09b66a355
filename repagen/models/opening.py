"""Opening a saved model by folder or Hub id, whether it was saved alone or as a part of a pipeline."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from diffusers import AutoModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from repagen.errors import UserError, refusing
from repagen.hub.places import repository_command


def open_component(name: str, part: Literal["transformer", "vae"], option: str, revision: str | None = None) -> Any:
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
    with (
        refusing(f"{option}: {name} cannot be loaded; allowed: {_allowed(part)}"),
        naming_absence(name, option, revision),
    ):
        model = load_model(name, **place)
    return model.eval()


def component_place(
    name: str, part: Literal["transformer", "vae"], option: str, revision: str | None = None
) -> dict[str, Any]:
    """Where a model is within `name`, as arguments of diffusers' loading functions; arguments as in `open_component`.

    Raises:
        UserError: a folder that is not there, or an id that cannot be reached.
    """
    refuse_missing_folder(name, option, _allowed(part))
    with refusing(f"{option}: {name} cannot be read; allowed: {_allowed(part)}"):
        subfolder = part if _is_pipeline(name, revision) else None
    return {"subfolder": subfolder, "revision": revision}


def load_model(name: str, **place: Any) -> Any:
    """Load a model of this library or of diffusers; `place` are arguments of diffusers' loading functions."""
    with warnings.catch_warnings():
        # diffusers' own call, about which the user can do nothing; it would stand before the line about a wrong name.
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")
        return AutoModel.from_pretrained(name, **place)


@contextmanager
def naming_absence(name: str, option: str, revision: str | None = None) -> Iterator[None]:
    """Where loading fails since files of a Hub id are not here and the Hub is not asked, name the command for them.

    Raises:
        UserError: in place of the library's error; others pass.
    """
    try:
        yield
    except OSError as error:
        link: BaseException | None = error
        while link is not None and not isinstance(link, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            link = link.__cause__ or link.__context__
        if link is None or Path(name).is_dir():
            raise
        raise UserError(
            f"{option}: {name} is not, or not whole, in the local cache and the Hub is out of reach; fetch it once "
            f"with {repository_command(name, revision)} on a machine that is online, or give a local folder"
        ) from error


def refuse_missing_folder(name: str, option: str, allowed: str) -> None:
    """Refuse a name that is neither a folder nor has the form of a Hub id, before libraries look for it at length.

    Raises:
        UserError: it is such a name.
    """
    if not Path(name).is_dir() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(f"{option}: no such folder: {name}; allowed: {allowed} (an id has the form org/name)")


def _allowed(part: str) -> str:
    return f"a folder or Hub id of a pipeline, or of its {part} alone"


def _is_pipeline(name: str, revision: str | None) -> bool:
    if Path(name).is_dir():
        return (Path(name) / "model_index.json").is_file()
    try:
        return bool(json.loads(Path(hf_hub_download(name, "model_index.json", revision=revision)).read_bytes()))
    except EntryNotFoundError:
        return False

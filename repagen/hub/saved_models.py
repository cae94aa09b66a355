"""Saved models: opened from a folder that has been looked at, and written alike wherever and by whomever."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from huggingface_hub import is_offline_mode

from repagen.config import nearest
from repagen.errors import UserError
from repagen.files import follow_umask, put_file
from repagen.hub.fetching import fetch_snapshot
from repagen.hub.inspection import inspect_folder
from repagen.hub.network_size import refuse_oversized
from repagen.hub.places import fetch_once

_WEIGHTS = "diffusion_pytorch_model"
# What fetching takes and loading from a folder does not.
_FETCHING = ("revision", "token", "local_files_only", "cache_dir", "force_download")


def inspected_source(
    source: str | os.PathLike[str],
    what: str,
    options: dict[str, Any],
    *,
    extra: Sequence[str] = (),
    weights: bool = True,
) -> Path:
    """Return the local folder to load a model of diffusers' layout from, which has been looked at.

    Args:
        source: the folder, or a Hub id, of which the model's config and safetensors are fetched.
        what: what is loaded, for messages.
        options: arguments of diffusers' loading functions; those that concern fetching are taken out. `subfolder` says
            where in `source` the model is, and stays.
        extra: patterns of further files of the model.
        weights: whether it must have weights.

    Raises:
        UserError: it cannot be fetched, or is refused by `inspect_folder`.
    """
    fetching = {name: options.pop(name) for name in _FETCHING if name in options}
    subfolder = options.get("subfolder") or ""
    root = Path(source)
    if not root.is_dir():
        given = {name: value for name, value in fetching.items() if value is not None}
        place = f"{subfolder}/" if subfolder else ""
        variant = options.get("variant")
        tensors = (
            [f"{_WEIGHTS}*.{variant}*"]
            if variant
            else [f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}-*-of-*.safetensors", f"{_WEIGHTS}.safetensors.index.json"]
        )
        patterns = ["model_index.json", *(f"{place}{name}" for name in ("config.json", *tensors, *extra))]
        root = fetch_snapshot(os.fspath(source), what=what, patterns=patterns, **{"revision": None, **given})
        needed = ["config.json", f"{_WEIGHTS}*.safetensors"] if weights else ["config.json"]
        _refuse_half(root / subfolder, os.fspath(source), given.get("revision"), what, needed)
    inspect_folder(root / subfolder, what)
    return root


def _refuse_half(folder: Path, repo_id: str, revision: str | None, what: str, needed: Sequence[str]) -> None:
    """Name the command for files that the cache lacks, where the Hub cannot be asked for them."""
    absent = [pattern for pattern in needed if not any(folder.glob(pattern))]
    if absent and is_offline_mode():
        raise UserError(
            f"{what} {repo_id!r}: in the local cache without {' and '.join(absent)}; {fetch_once(repo_id, revision)}"
        )


def refuse_unknown_keywords(what: str, given: Iterable[str], own: Iterable[str], *loaders: Any) -> None:
    """Refuse keywords of `from_pretrained` that would have no effect: diffusers goes on with a warning.

    Args:
        what: is loaded, for the message.
        given: names of the keywords.
        own: those of the class itself.
        loaders: functions of diffusers, which take the others out of their `**kwargs` by name; the names are read from
            their code, so that those of every version of diffusers are known.

    Raises:
        UserError: one is of neither, naming a near one.
    """
    constants = [value for loader in loaders for value in inspect.unwrap(loader).__code__.co_consts]
    known = sorted({*own, *(value for value in constants if isinstance(value, str) and value.isidentifier())})
    if unknown := [name for name in given if name not in known]:
        raise UserError(
            f"{what}: from_pretrained has no keyword {unknown[0]!r}{nearest(unknown[0], known) or '; leave it out'}"
        )


def tidy_saved(folder: Path) -> None:
    """Give a saved model's or pipeline's weights the mode of the umask, and keep from configs where parts came from.

    diffusers writes the path that a model was loaded from into its config: it means nothing elsewhere, tells of the
    machine, and makes two saves of the same model differ.
    """
    for path in folder.rglob("*.safetensors"):
        follow_umask(path)
    for path in (*folder.rglob("config.json"), *folder.rglob("model_index.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            put_file(path, f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())


class SavedModelMixin:
    """Stands before diffusers' `ModelMixin`: loads from a folder that has been looked at, and saves alike anywhere.

    It stands behind `PublishedModelMixin`, which uploads what was saved.
    """

    _folder: Path | None = None  # that it was loaded from

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see `ModelMixin.from_pretrained`.

        Raises:
            UserError: a folder that cannot be fetched, that names code or holds unsafe files, or whose config
                describes a larger network than its weights can be of; an unknown keyword.
        """
        loaders = (ModelMixin.from_pretrained, ConfigMixin.load_config, ConfigMixin.from_config)
        refuse_unknown_keywords(cls.__name__, kwargs, inspect.signature(cls).parameters, *loaders)
        root = inspected_source(pretrained_model_name_or_path, cls.__name__, kwargs)
        folder = (root / (kwargs.get("subfolder") or "")).absolute()
        config: Any = cls.load_config(folder)  # type: ignore[attr-defined]
        refuse_oversized(lambda: cls.from_config(config), folder, f"{folder}/config.json")  # type: ignore[attr-defined]
        result = super().from_pretrained(root, **kwargs)  # type: ignore[misc]
        model = result[0] if isinstance(result, tuple) else result
        model.register_to_config(_name_or_path=os.fspath(pretrained_model_name_or_path))
        model._folder = folder
        return result

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save config and weights; see `ModelMixin.save_pretrained`. Nothing tells where the model was loaded from."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        tidy_saved(Path(save_directory))

"""Loading a pipeline from a folder, or from the Hub at one commit."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import is_offline_mode

from repagen.errors import UserError, refusing
from repagen.hub.fetching import fetch_snapshot, naming_hub_errors, resolve_commit
from repagen.hub.folder_facts import PIPELINE_FILE
from repagen.hub.inspection import inspect_folder
from repagen.hub.places import repository_command
from repagen.hub.saved_models import refuse_unknown_keywords, tidy_saved
from repagen.models.opening import refuse_revision_of_folder
from repagen.registration import is_loadable_library

PIPELINES = {
    "ClassToImagePipeline": "repagen.pipelines.class_to_image",
    "TextToImagePipeline": "repagen.pipelines.text_to_image",
}
"""Pipelines of this library => their modules."""

_REMOTE_CODE = ("custom_pipeline", "custom_revision", "trust_remote_code")
_OF_THE_HUB = ("cache_dir", "token", "local_files_only", "force_download")


class CommitLoading(DiffusionPipeline):
    """A pipeline that comes from the Hub at one commit, without anybody's code.

    Attributes:
        hub_commit: the commit it was loaded from; None for a folder. It says where this object is from, so it is not
            saved: what `save_pretrained` writes is a thing of its own, and may hold other weights.
    """

    hub_commit: str | None = None
    # Components that a folder may lack. diffusers' own list of such is for those that a call never needs.
    _may_be_absent: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline from a folder or the Hub; see `DiffusionPipeline.from_pretrained`.

        The revision is resolved to a commit once and everything is fetched at that commit, which `hub_commit` keeps.
        What is in the cache at that commit is not asked for again.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or a Hub id such as "org/name".
            kwargs: `revision` (branch, tag or commit), `dtype` (a torch dtype or its name, or
                {component: dtype, "default": dtype}),
                `variant`, `device_map`, `quantization_config`, `token`, `cache_dir`, `local_files_only`,
                `force_download`, components to use in place of the saved ones, and what else diffusers takes.

        Raises:
            UserError: one line for what cannot be reached, is no pipeline, one of another kind or with parts missing,
                for a dtype or a component of `dtype` that is none, an unknown keyword, and for remote code, which is
                never run.
        """
        name = os.fspath(pretrained_model_name_or_path)
        _refuse_code(name, kwargs)
        components, settings = cls._get_signature_keys(cls)
        refuse_unknown_keywords(cls.__name__, kwargs, {*components, *settings}, DiffusionPipeline.from_pretrained)
        given = {
            key: _dtypes(kwargs[key], components) for key in ("dtype", "torch_dtype") if kwargs.get(key) is not None
        }
        kwargs = {**kwargs, **given}
        commit = None
        folder = Path(name)
        if not folder.is_dir():
            commit = _commit(name, kwargs)
            folder = Path(cls.download(name, **{**kwargs, "revision": commit}))
        left = {key: value for key, value in kwargs.items() if key not in {*_OF_THE_HUB, *_REMOTE_CODE, "revision"}}
        inspect_folder(folder, f"pipeline {name}")
        index = _read_index(folder, name, [cls.__name__])
        left = {**{key: None for key in cls._may_be_absent if index.get(key) == [None, None]}, **left}
        _refuse_missing(folder, name, index, cls, left)
        again = ""
        if commit is not None and is_offline_mode():
            again = f"; if files of it are missing, get them with {repository_command(name, kwargs.get('revision'))}"
        with refusing(f"{name} cannot be loaded as a {cls.__name__}{again}"):
            pipe = super().from_pretrained(folder, **left)
        pipe.register_to_config(_name_or_path=name)
        pipe.hub_commit = commit
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save into a folder, alike wherever its parts came from; see `DiffusionPipeline.save_pretrained`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        tidy_saved(Path(save_directory))

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> Path:
        """Download what `from_pretrained` would load at one commit; see `DiffusionPipeline.download`.

        Args:
            pretrained_model_name: the Hub id.
            kwargs: as of `from_pretrained`.

        Returns:
            The folder in the cache, whose name is the commit.

        Raises:
            UserError: as `from_pretrained`; nothing but the index was downloaded where it is another kind of pipeline.
        """
        name = pretrained_model_name
        _refuse_code(name, kwargs)
        commit = _commit(name, kwargs)
        asking = {key: kwargs[key] for key in _OF_THE_HUB if key in kwargs}
        # With the config, so that a model alone is an answer and not an empty one.
        folder = fetch_snapshot(
            name, revision=commit, patterns=[PIPELINE_FILE, "config.json"], what="pipeline", **asking
        )
        if asking.get("force_download"):  # diffusers would fetch nothing but the index anew
            here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            fetch_snapshot(name, revision=commit, patterns=here, what="pipeline", **asking)
        inspect_folder(folder, f"pipeline {name}")
        _read_index(folder, name, [cls.__name__])
        if not is_loadable_library():
            # diffusers would refuse components of a library it does not list, so fetch the whole repository.
            return fetch_snapshot(name, revision=commit, what="pipeline", **asking)
        return cls._download_parts(
            name, {**kwargs, "revision": commit, "use_safetensors": True, "force_download": False}
        )

    @classmethod
    def _download_parts(cls, name: str, kwargs: dict[str, Any]) -> Path:
        """Let diffusers choose the files; a commit does not change, so the Hub is asked only for what is not here."""
        local = bool(kwargs.get("local_files_only")) or is_offline_mode()
        asking = naming_hub_errors(name, kwargs["revision"], what="pipeline", local_files_only=local)
        with refusing(f"{name} cannot be downloaded"), asking:
            try:
                return Path(super().download(name, **{**kwargs, "local_files_only": True}))
            except FileNotFoundError:
                if local:
                    raise
            return Path(super().download(name, **kwargs))


def saved_pipeline_class(name: str, revision: str | None = None, kinds: Collection[str] = PIPELINES) -> Any:
    """Return the class of a pipeline in a folder or on the Hub, of which no more than the index is fetched.

    Args:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        kinds: names of the classes that are allowed, of `PIPELINES`.

    Raises:
        UserError: there is none, one of another kind, or a revision of a folder.
    """
    refuse_revision_of_folder(name, revision)
    folder = Path(name)
    if not folder.is_dir():
        files = [PIPELINE_FILE, "config.json"]
        folder = fetch_snapshot(name, revision=_commit(name, {"revision": revision}), patterns=files, what="pipeline")
    inspect_folder(folder, f"pipeline {name}")
    kind = _read_index(folder, name, kinds)["_class_name"]
    return getattr(importlib.import_module(PIPELINES[kind]), kind)


def _commit(name: str, kwargs: Mapping[str, Any]) -> str:
    asking = {key: kwargs[key] for key in ("cache_dir", "token", "local_files_only") if key in kwargs}
    return resolve_commit(name, kwargs.get("revision"), what="pipeline", **asking)


def _refuse_code(name: str, kwargs: Mapping[str, Any]) -> None:
    if given := [key for key in _REMOTE_CODE if kwargs.get(key)]:
        raise UserError(
            f"{given[0]}={kwargs[given[0]]!r} was given for {name}; repagen runs no code of a repository, leave it out"
        )
    if kwargs.get("use_safetensors") is False:
        raise UserError(f"use_safetensors=False was given for {name}; weights are loaded from safetensors alone")


def _dtypes(given: Any, components: Collection[str]) -> Any:
    """Return a `dtype` with torch's dtypes for their names; diffusers takes what it does not know for float32."""
    if not isinstance(given, Mapping):
        return _dtype(given)
    allowed = [*sorted(components), "default"]
    if strange := [name for name in given if name not in allowed]:
        raise UserError(f"dtype: {strange[0]!r} is no component; allowed are {', '.join(allowed)}")
    return {name: _dtype(value) for name, value in given.items()}


def _dtype(given: Any) -> torch.dtype:
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(
            f"dtype={given!r} is none for weights; give one such as torch.bfloat16, or its name 'bfloat16'"
        )
    return dtype


def _read_index(folder: Path, name: str, kinds: Collection[str]) -> dict[str, Any]:
    """Read `model_index.json`, which has been inspected; refuse a folder without one and other kinds of pipelines."""
    path = folder / PIPELINE_FILE
    if not path.is_file():
        alone = " (a model alone: load it with diffusers.AutoModel)" if (folder / "config.json").is_file() else ""
        raise UserError(
            f"{name} holds no pipeline: it has no {PIPELINE_FILE}{alone}; name a folder or Hub id of a pipeline"
        )
    index = json.loads(path.read_text(encoding="utf-8"))
    found = index.get("_class_name")
    if found not in kinds:
        raise UserError(f"{name} holds a {found}; a {' or '.join(kinds)} is needed")
    return index


def _refuse_missing(folder: Path, name: str, index: Mapping[str, Any], kind: Any, given: Mapping[str, Any]) -> None:
    """Refuse a pipeline with parts that it has no folder for, or without the variant that is asked for."""
    expected = set(kind._get_signature_keys(kind)[0])
    stored = {key for key in expected if isinstance(index.get(key), list) and index[key][0] is not None}
    absent = sorted(expected - stored - {*kind._optional_components} - given.keys())
    absent += sorted(key for key in stored - given.keys() if not (folder / key).is_dir())
    if absent:
        raise UserError(
            f"{name} cannot be loaded: the pipeline lacks {', '.join(absent)}; complete it, or pass the component to "
            "from_pretrained"
        )
    variant = given.get("variant")
    if variant is not None and not any(folder.glob(f"*/*.{variant}*")):
        raise UserError(
            f"{name} cannot be loaded: You are trying to load the model files of the `variant={variant}`, but there "
            f"are no weights of variant={variant}; leave it out, or name one that is there"
        )

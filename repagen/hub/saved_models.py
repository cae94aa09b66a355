"""Opening a saved model by folder or Hub id: fetched at one commit, looked at, and only then read by a library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from repagen.hub.fetching import fetch_snapshot
from repagen.hub.inspection import inspect_folder

_WEIGHTS = "diffusion_pytorch_model"
# What fetching takes and loading from a folder does not.
_FETCHING = ("revision", "token", "local_files_only", "cache_dir", "force_download")


def inspected_source(source: str | os.PathLike[str], what: str, options: dict[str, Any]) -> Path:
    """Return the local folder to load a model of diffusers' layout from, which has been looked at.

    Args:
        source: the folder, or a Hub id, of which the model's config and safetensors are fetched.
        what: what is loaded, for messages.
        options: arguments of diffusers' loading functions; those that concern fetching are taken out. `subfolder` says
            where in `source` the model is, and stays.

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
        weights = (
            [f"{_WEIGHTS}*.{variant}*"]
            if variant
            else [f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}-*-of-*.safetensors", f"{_WEIGHTS}.safetensors.index.json"]
        )
        patterns = ["model_index.json", *(f"{place}{name}" for name in ("config.json", *weights))]
        root = fetch_snapshot(os.fspath(source), what=what, patterns=patterns, **{"revision": None, **given})
    inspect_folder(root / subfolder, what)
    return root


class SavedModelMixin:
    """A `ModelMixin` that is loaded from a folder that has been looked at.

    Saved, it says nothing of the place it was loaded from.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote; see `ModelMixin.from_pretrained`.

        Raises:
            UserError: a folder that cannot be fetched, or that names code or holds unsafe files.
        """
        root = inspected_source(pretrained_model_name_or_path, cls.__name__, kwargs)
        return super().from_pretrained(root, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Return the config as JSON, without the path it was loaded from."""
        content = json.loads(super().to_json_string())  # type: ignore[misc]
        content.pop("_name_or_path", None)
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

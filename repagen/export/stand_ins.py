"""What a copy has in place of the library's dealings with the Hub, which it leaves to diffusers; see `modules.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class CommitLoading(DiffusionPipeline):
    """Base of pipelines: loaded by diffusers alone, which asks for trust before it runs this code."""


class PublishedMixin:
    """Base of pipelines and models: without the library's model card."""


class PublishedModelMixin(PublishedMixin):
    """The same for models."""


class SavedModelMixin:
    """Base of models: loaded from the folder that diffusers has fetched."""

    _folder: Path | None = None


def inspected_source(source: str | os.PathLike[str], what: str, options: dict[str, Any], **further: Any) -> Path:
    """Return that folder."""
    return Path(source)

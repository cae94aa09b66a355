"""Where a pipeline comes from and what it consists of, for results and for the metadata of images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from repagen.errors import UserError, refusing
from repagen.hub.places import without_names
from repagen.models.fingerprint import hash_tensors

TRAINING_FILE = "training.json"
"""What a pipeline's folder says about its training, beside `model_index.json`."""


def component_settings(component: Any) -> dict[str, Any]:
    """A component's configuration, but for where it came from."""
    return {name: value for name, value in dict(component.config).items() if not name.startswith("_")}


def pipeline_sha256(pipeline: Any) -> str:
    """Return a hash of weights and settings of all parts of a pipeline, as they are now (so it depends on the dtype).

    A text encoder counts by what it makes of prompts, so that one that is kept by reference need not be fetched for it
    and may lie anywhere.

    Args:
        pipeline: a `ClassToImagePipeline` or `TextToImagePipeline`.
    """
    weaker, reader = (getattr(pipeline, name, None) for name in ("guidance_transformer", "text_encoder"))
    present = [pipeline.transformer, pipeline.vae, *([] if weaker is None else [weaker])]
    weights = [hash_tensors(part.state_dict().values()) for part in present]
    settings: list[Any] = [component_settings(part) for part in (*present, pipeline.scheduler)]
    if reader is not None:
        settings.append([without_names(reader.describe()), str(reader.dtype)])
    return hashlib.sha256(json.dumps([weights, settings], sort_keys=True, default=str).encode()).hexdigest()


def training_record(source: str | Path | None, revision: str | None = None) -> dict[str, Any]:
    """Return what a saved pipeline says about its training (`training.json`); empty where it says nothing.

    Args:
        source: the pipeline's folder or Hub id; None: it was never saved.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: the file is no JSON object.
    """
    if not source:
        return {}
    path = Path(source) / TRAINING_FILE
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(str(source), TRAINING_FILE, revision=revision))
        except (EntryNotFoundError, OSError, ValueError):  # most repositories on the Hub have none
            return {}
    if not path.is_file():
        return {}
    with refusing(f"{path}: cannot be read as JSON"):
        record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(record).__name__}; delete it, or fetch it again")
    return record

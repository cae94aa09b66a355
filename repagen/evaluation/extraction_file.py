"""What is known of a set of images, on disk, so that a reference is looked at once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from repagen.errors import UserError
from repagen.evaluation.extraction import Extraction, Needs, extract, features_key
from repagen.evaluation.extractor import FeatureExtractor
from repagen.evaluation.moments import Statistics
from repagen.evaluation.samples import ImageSource, Unreadable
from repagen.files import replace_file

_FACTS = "extraction"


def extract_once(
    source: ImageSource,
    extractors: Mapping[str, FeatureExtractor],
    needs: Needs,
    folder: Path,
    *,
    max_bad_images: int = 0,
    **options: Any,
) -> Extraction:
    """Look at every image of a source, or read from the folder what an earlier call found in the same images.

    Args:
        source, extractors, needs, max_bad_images, options: see `extract`; a score is not kept.
        folder: holds a file for each source, extractors and needs, called by their hash; all processes see it.

    Raises:
        UserError: as `extract` does, and for a damaged file.
    """
    key = {
        **features_key(source, extractors),
        "count": len(source),
        "state": source.state(range(len(source))),
        "needs": dataclasses.asdict(needs),
        "bad": max_bad_images,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{digest[:16]}.safetensors"
    state = PartialState()
    found = [path.is_file()]
    if state.num_processes > 1:  # the main process decides for all
        broadcast_object_list(found)
    partial = folder / f"{digest[:16]}.partial"
    if found[0]:
        extraction = load_extraction(path)
    else:
        extraction = extract(source, extractors, needs, partial, max_bad_images=max_bad_images, **options)
        state.wait_for_everyone()
        if state.is_main_process:
            save_extraction(path, extraction)
    if state.is_main_process:  # also where a process was killed just before
        shutil.rmtree(partial, ignore_errors=True)
    return extraction


def save_extraction(path: Path, extraction: Extraction) -> None:
    """Write what is known of a set of images, but for a score, as safetensors; whole or not at all."""
    tensors = {f"features/{name}": rows for name, rows in extraction.features.items()}
    for name, one in extraction.statistics.items():
        tensors |= {f"mean/{name}": one.mean, f"covariance/{name}": one.covariance}
    facts = {
        "counts": {name: one.count for name, one in extraction.statistics.items()},
        "features": list(extraction.features),
        "count": extraction.count,
        "pixels_sha256": extraction.pixels_sha256,
        "image_size": extraction.image_size,
        "unreadable": [[image.name, image.reason] for image in extraction.unreadable],
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, lambda temporary: save_file(contiguous, temporary, {_FACTS: json.dumps(facts)}))


def load_extraction(path: Path) -> Extraction:
    """Read what `save_extraction` wrote.

    Raises:
        UserError: when the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()[_FACTS])
            return Extraction(
                statistics={
                    name: Statistics(file.get_tensor(f"mean/{name}"), file.get_tensor(f"covariance/{name}"), count)
                    for name, count in facts["counts"].items()
                },
                features={name: file.get_tensor(f"features/{name}") for name in facts["features"]},
                score=None,
                count=facts["count"],
                pixels_sha256=facts["pixels_sha256"],
                image_size=tuple(facts["image_size"]),
                unreadable=tuple(Unreadable(*image) for image in facts["unreadable"]),
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it, and it is made again") from error

"""One pass over images of prompts: what each judge says of every image, kept on disk as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from repagen.errors import UserError
from repagen.evaluation.extraction import (
    ImageSink,
    all_unreadable,
    listed,
    own_blocks,
    pixel_digest,
    show_progress,
    stored_blocks,
)
from repagen.evaluation.processes import kept_or_temporary
from repagen.evaluation.samples import ImageSource, Unreadable
from repagen.evaluation.store import FeatureBlock, FeatureStore
from repagen.evaluation.text_to_image.prompted import PromptedImages


class Judge(Protocol):
    """What looks at images with their prompts."""

    def __call__(self, images: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """Return what is said of images, (B, D) float.

        Args:
            images: uint8 (3, H, W) each, of any sizes.
            indices: their numbers within the source, which tell their prompts.
        """


def judge_images(
    source: PromptedImages,
    judges: Mapping[str, Judge],
    identities: Mapping[str, Any],
    *,
    folder: Path | None = None,
    batch_size: int = 50,
    sink: ImageSink | None = None,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Let judges look at every image once.

    Under `accelerate launch` every process takes a share of the images, and all return the same.

    Args:
        source: the images; they may differ in size.
        judges: name => judge.
        identities: name => what its judgements are a function of beside the image and its prompt, ready for JSON.
        folder: for what was said, where a pass may be interrupted; the same call continues from it. The caller removes
            it afterwards. By default it is lost with the process.
        batch_size: images in hand at once, per process, rounded up to passes of 32.
        sink: takes the images, for example to write them out.

    Returns:
        Name => (N, D) float32, and the digest of each image's pixels.

    Raises:
        UserError: on images that cannot be read, all of which are listed.
    """
    state = PartialState()
    found: dict[int, tuple[str, dict[str, torch.Tensor]]] = {}

    def look(loaded: Mapping[int, torch.Tensor | Unreadable]) -> FeatureBlock:
        indices, images = list(loaded), _readable(source, loaded)
        if sink is not None:
            for index, image in zip(indices, images, strict=True):
                sink.put(index, image)
        features = {name: judge(images, indices).float().cpu() for name, judge in judges.items()}
        return FeatureBlock(indices, features, [pixel_digest(image) for image in images], None, {})

    with kept_or_temporary(folder) as place:
        written = sink.place if sink else None
        key = {"source": source.protocol, "origin": source.origin(), "prompts": source.prompts.sha256}
        store = FeatureStore(place, {**key, "judges": dict(identities), "written": written})
        with tqdm(total=len(source), desc="scores", unit="image", disable=not state.is_main_process) as progress:
            for blocks in own_blocks(len(source), batch_size):
                for content in stored_blocks(blocks, store, source, look):
                    for row, index in enumerate(content.indices):
                        said = {name: rows[row].clone() for name, rows in content.features.items()}
                        found[index] = content.digests[row], said
                show_progress(progress, blocks)
        gathered = {index: one for part in gather_object([found]) for index, one in part.items()}
    ordered = [gathered[index] for index in range(len(source))]
    return {name: torch.stack([said[name] for _, said in ordered]) for name in judges}, [one for one, _ in ordered]


def load_readable(source: ImageSource, indices: Sequence[int]) -> list[torch.Tensor]:
    """Load images, uint8 (3, H, W) each.

    Raises:
        UserError: when one cannot be read; every unreadable image of the source is listed.
    """
    return _readable(source, dict(zip(indices, source.load(indices), strict=True)))


def _readable(source: ImageSource, loaded: Mapping[int, torch.Tensor | Unreadable]) -> list[torch.Tensor]:
    images = [image for image in loaded.values() if not isinstance(image, Unreadable)]
    if len(images) < len(loaded):
        unreadable = all_unreadable(source)
        raise UserError(f"{len(unreadable)} unreadable images, 0 allowed: {listed(unreadable)}; replace them")
    return images

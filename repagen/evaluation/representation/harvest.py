"""Token features of a dataset's images, slice by slice, computed once and kept in memory or in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from repagen.data import ImageDataset, load_in_order
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation.extraction import pixel_digest, pixels_sha256
from repagen.evaluation.extractor import full_float32
from repagen.evaluation.representation.cache import FeatureCache
from repagen.evaluation.representation.sources import EncoderSource, FeatureSlice, FeatureSource, GeneratorSource
from repagen.evaluation.samples import to_uint8
from repagen.hub.places import without_names

FeatureType = Literal["float32", "float16"]
"""In which features are stored; read-outs are computed in float32 at least."""


@dataclass(frozen=True)
class Change:
    """What is done to images before they are encoded.

    Attributes:
        name: says all about it; part of a cache's identity.
        apply: images (B, 3, H, H) => the same shape.
    """

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Harvest:
    """Token features of N images.

    Attributes:
        slices: where they were read.
        grid: rows and columns (h, w) of the T tokens.
        image_size: side of the images in pixels.
        labels: (N,) int64.
        indices: (N,) int64, places of the images in their dataset.
        pixels_sha256: hash of the images that were read, 8-bit and before any change; equal for equal images.
        made_by: all that the features depend on.
    """

    slices: tuple[FeatureSlice, ...]
    grid: tuple[int, int]
    image_size: int
    labels: torch.Tensor
    indices: torch.Tensor
    pixels_sha256: str
    made_by: dict[str, Any]
    _kept: dict[FeatureSlice, torch.Tensor] = field(repr=False)
    _cache: FeatureCache | None = field(repr=False)
    _last_read: tuple[FeatureSlice, torch.Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def tokens(self, place: FeatureSlice) -> torch.Tensor:
        """Tokens (N, T, D) of a slice, row-major on `grid`, in the type they were stored in.

        Raises:
            UserError: it was not harvested, or its file in the cache was damaged meanwhile.
        """
        if place in self._kept:
            return self._kept[place]
        if self._last_read is None or self._last_read[0] != place:  # read-outs ask for one slice several times
            self._last_read = None
            stored = self._cache.load(place) if self._cache is not None else None
            if stored is None:
                raise UserError(f"features of {place} are not there; harvest them (again)")
            self._last_read = place, stored["tokens"]
        return self._last_read[1]

    def pooled(self, place: FeatureSlice) -> torch.Tensor:
        """Mean token (N, D) float32 of a slice."""
        return self.tokens(place).float().mean(dim=1)


def harvest_generator(
    pipeline: Any,
    dataset: ImageDataset,
    *,
    blocks: Sequence[int] | None = None,
    timesteps: Sequence[float] = (0.5,),
    seed: int = 0,
    batch_size: int = 50,
    null_label: bool = True,
    indices: Sequence[int] | None = None,
    dtype: FeatureType = "float32",
    cache: str | Path | None = None,
    change: Change | None = None,
    draw: int = 0,
) -> Harvest:
    """Read a generator's blocks on noised images; see `GeneratorSource` for what is done to them.

    Args:
        pipeline: a `ClassToImagePipeline`, on its device.
        dataset: the images.
        blocks: counted from 1; None for all.
        timesteps: t in [0, 1]; 0 = data, 1 = noise.
        seed: of the noise.
        batch_size: images at once; moves the features by rounding alone.
        null_label: tell the model no class; False tells it the image's own.
        indices: which images of the dataset; all by default.
        dtype: in which features are stored.
        cache: folder that keeps them; see `FeatureCache`.
        change: done to the images first.
        draw: number of the noise, for several independent ones of one image.

    Raises:
        UserError: as `GeneratorSource`; unreadable images; images of another size than the model's; features that are
            not finite.
    """
    source = GeneratorSource(pipeline, blocks=blocks, timesteps=timesteps, seed=seed, null_label=null_label, draw=draw)
    return harvest(source, dataset, batch_size=batch_size, indices=indices, dtype=dtype, cache=cache, change=change)


def harvest_encoder(
    encoder: VisionEncoder,
    dataset: ImageDataset,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 50,
    indices: Sequence[int] | None = None,
    dtype: FeatureType = "float32",
    cache: str | Path | None = None,
    change: Change | None = None,
) -> Harvest:
    """Read the layers of an encoder; arguments as in `harvest_generator`, `layers` as in `EncoderSource`."""
    source = EncoderSource(encoder, layers)
    return harvest(source, dataset, batch_size=batch_size, indices=indices, dtype=dtype, cache=cache, change=change)


def harvest(
    source: FeatureSource,
    dataset: ImageDataset,
    *,
    batch_size: int = 50,
    indices: Sequence[int] | None = None,
    dtype: FeatureType = "float32",
    cache: str | Path | None = None,
    change: Change | None = None,
) -> Harvest:
    """Read all slices of a source on a dataset's images. Slices that the cache has are not computed.

    Without a cache all features stay in memory; with one, those of one pass at a time.
    """
    chosen = list(range(len(dataset)) if indices is None else indices)
    made_by = without_names(source.describe()) | {
        "dataset": dataset.state(),
        "images": hashlib.sha256(repr(chosen).encode()).hexdigest(),
        "change": change.name if change else None,
        "stored_as": dtype,
    }
    store = FeatureCache(cache, made_by) if cache is not None else None
    rows: dict[str, torch.Tensor] | None = None
    pixels = store.pixels_sha256 if store else None
    missing = []
    for place in source.slices:
        stored = store.load(place) if store else None
        missing += [] if stored else [place]
        rows = stored or rows
    kept: dict[FeatureSlice, torch.Tensor] = {}
    for places in source.passes(missing):
        rows, pixels, tokens = _read(source, places, dataset, chosen, batch_size, change, getattr(torch, dtype))
        for place in places:
            if store is None:
                kept[place] = tokens[place]
            else:
                store.save(place, {"tokens": tokens[place], "label": rows["label"], "index": rows["index"]}, pixels)
    assert rows is not None and pixels is not None
    return Harvest(
        slices=tuple(source.slices),
        grid=source.grid,
        image_size=dataset.config.image_size,
        labels=rows["label"],
        indices=rows["index"],
        pixels_sha256=pixels,
        made_by=made_by,
        _kept=kept,
        _cache=store,
    )


def _read(
    source: FeatureSource,
    places: Sequence[FeatureSlice],
    dataset: ImageDataset,
    indices: Sequence[int],
    batch_size: int,
    change: Change | None,
    dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], str, dict[FeatureSlice, torch.Tensor]]:
    """One pass over the images: their labels and indices, their hash, and the tokens of every slice, on the CPU."""
    rows: dict[str, list[torch.Tensor]] = {"label": [], "index": []}
    digests: list[str] = []
    parts: dict[FeatureSlice, list[torch.Tensor]] = {place: [] for place in places}
    what = str(places[0]).split(", ")[-1] if places[0].timestep is not None else "layers"
    with tqdm(total=len(indices), desc=f"features, {what}", unit="image", leave=False) as progress_bar:
        for batch in load_in_order(dataset, indices, batch_size):
            digests += [pixel_digest(image) for image in to_uint8(batch["image"])]
            images = change.apply(batch["image"]) if change else batch["image"]
            with full_float32(source.device):
                tokens = source.tokens(places, images, batch["label"], batch["index"].tolist())
            for place, values in zip(places, tokens, strict=True):
                parts[place].append(_stored(values, dtype, place, source))
            for key, kept in rows.items():
                kept.append(batch[key])
            progress_bar.update(len(images))
    if not digests:
        raise UserError("data: no readable image; nothing to read features of")
    joined = {place: torch.cat(parts.pop(place)).contiguous() for place in places}
    return {key: torch.cat(kept) for key, kept in rows.items()}, pixels_sha256(digests), joined


def _stored(values: torch.Tensor, dtype: torch.dtype, place: FeatureSlice, source: FeatureSource) -> torch.Tensor:
    """Features as they are kept, on the CPU; refused where they are not finite."""
    if not torch.isfinite(values).all():
        computed = str(values.dtype).removeprefix("torch.")
        remedy = "check its weights" if values.dtype == torch.float32 else "load it in float32, or check its weights"
        raise UserError(f"{source.name}: its features of {place}, computed in {computed}, are not finite; {remedy}")
    stored = values.to("cpu", dtype)
    if not torch.isfinite(stored).all():
        raise UserError(f"dtype: features of {place} are too large for {str(dtype)[6:]}; store them as float32")
    return stored

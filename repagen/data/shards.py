"""Cached latents and alignment targets in safetensors shards, as `repagen cache` writes them.

folder/
    latents-00000.safetensors ...   rows of "latent" (R, C, h, w), all of one size, "label" (R,), "index" (R,), one
                                    "target.K" (R, N, D) per alignment encoder, "latent_std" for KL autoencoders,
                                    and the same of the mirrored image with the suffix ".flipped"; of images with
                                    captions "captions", the bytes of all rows' captions, and "captions_size" (R,)
    manifest.json                   what made them, and name, rows, size and sha256 of each shard; written last
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from repagen.data.captions import Captions
from repagen.data.dataset import SampleDataset
from repagen.errors import UserError
from repagen.hub.places import without_names

MANIFEST_NAME = "manifest.json"
SHARD_FORMAT = "repagen-latents-1"
FLIPPED = ".flipped"
MAX_OPEN_SHARDS = 64


class LatentShards(SampleDataset):
    """Latents, labels and alignment targets of a cache.

    Attributes:
        manifest: what `repagen cache` recorded.
        labels: label of every sample (N,) int64.
        latent_shape: (C, h, w); where there are several sizes, of the first shard.
        flipped: whether latents of the mirrored images are there as well.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        """Open a cache.

        Args:
            path: its folder.
            verify: check the sha256 of every shard (the whole cache is read once); sizes are checked always.

        Raises:
            UserError: the cache is missing, unfinished or damaged; the file is named.
        """
        self._folder = Path(path).expanduser()
        self.manifest = _read_manifest(self._folder)
        self._shards: list[Mapping[str, Any]] = self.manifest["shards"]
        for shard in self._shards:
            _check_shard(self._folder / shard["file"], shard, verify)
        self._ends = list(accumulate(shard["rows"] for shard in self._shards))
        self.class_names = list(self.manifest["class_names"])
        self.flipped = bool(self.manifest["flipped"])
        self._num_targets = len(self.manifest["encoders"])
        self._files: dict[int, Any] = {}
        first = self._file(0)
        shapes = [self._file(number).get_slice("latent").get_shape() for number in range(len(self._shards))]
        self.latent_shape = tuple(shapes[0][1:])
        sizes = [(height, width) for _, _, height, width in shapes]
        if len(set(sizes)) > 1:
            self.bucket_sizes = list(dict.fromkeys(sizes))
        self._bucket_of_shard = [self.bucket_sizes.index(size) if self.bucket_sizes else 0 for size in sizes]
        self._has_std = "latent_std" in first.keys()  # noqa: SIM118 - an open file, not a dict
        self.labels = torch.cat([self._file(number).get_tensor("label") for number in range(len(self._shards))])
        self.has_captions = "captions" in first.keys()  # noqa: SIM118
        if self.has_captions:
            lengths = [self._file(number).get_tensor("captions_size") for number in range(len(self._shards))]
            self._captions_end = [part.cumsum(0) for part in lengths]

    def __len__(self) -> int:
        return self._ends[-1]

    @cached_property
    def buckets(self) -> torch.Tensor | None:
        """See `SampleDataset.buckets`; the sizes are those of the latents."""
        rows = torch.tensor([shard["rows"] for shard in self._shards])
        return torch.tensor(self._bucket_of_shard).repeat_interleave(rows) if self.bucket_sizes else None

    def load(self, index: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return sample `index`.

        Args:
            index: in [0, len).
            generator: decides, where the cache holds mirrored images too, which of the two is taken; without it the
                unmirrored one.

        Returns:
            "latent" (C, h, w) float32, standardised; "label"; "index"; "targets", a list of (N, D) float32 in the
            order of the cache's encoders; for KL autoencoders "latent_std" (C, h, w): `latent` is the mean; of images
            with captions "caption", one of them drawn after the mirroring.
        """
        number, row = self._locate(index)
        file = self._file(number)
        mirrored = self.flipped and generator is not None and bool(torch.rand((), generator=generator) < 0.5)
        suffix = FLIPPED if mirrored else ""

        def read(name: str) -> torch.Tensor:
            return file.get_slice(name + suffix)[row : row + 1][0].float()

        sample: dict[str, Any] = {"latent": read("latent"), "label": int(self.labels[index]), "index": index}
        sample["targets"] = [read(f"target.{k}") for k in range(self._num_targets)]
        if self._has_std:
            sample["latent_std"] = read("latent_std")
        if self.has_captions:
            sample["caption"] = self.captions(index).draw(generator)
        return sample

    def captions(self, index: int) -> Captions:
        """Return all captions of sample `index`; of a cache of images with captions."""
        number, row = self._locate(index)
        ends = self._captions_end[number]
        start = int(ends[row - 1]) if row else 0
        content = self._file(number).get_slice("captions")[start : int(ends[row])]
        return Captions.from_json(content.numpy().tobytes())

    def describe(self, index: int) -> str:
        """Return shard, row and source image of sample `index`."""
        number, row = self._locate(index)
        source = int(self._file(number).get_slice("index")[row : row + 1][0])
        return f"row {row} of {self._folder / self._shards[number]['file']} (image {source} of the cached dataset)"

    def fingerprint(self) -> str:
        """Return a hash of the shards' contents and of what made them."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def require(self, autoencoder: Mapping[str, Any], encoders: Sequence[Mapping[str, Any]] = ()) -> None:
        """Refuse a cache that was made with other models than a run uses.

        Args:
            autoencoder: {"encoder": hash, "statistics": hash} as `repagen.training.latent_cache.describe_autoencoder`
                gives them.
            encoders: the same of the alignment encoders, in order; empty when the run aligns with none.

        Raises:
            UserError: something differs; it is named.
        """
        made = self.manifest["autoencoder"]
        for key in ("encoder", "statistics"):
            if made[key] != autoencoder[key]:
                raise UserError(
                    f"{self._folder}: these latents were made with another {key} of the autoencoder (cache: "
                    f"{made['name']}, {made[key][:12]}; now: {autoencoder['name']}, {autoencoder[key][:12]}); use "
                    "that autoencoder, or run `repagen cache` again"
                )
        if not encoders:
            return
        for order, (cached, needed) in enumerate(zip_longest(self.manifest["encoders"], encoders)):
            if without_names(cached) != without_names(needed):
                names = [encoder["name"] if encoder else "none" for encoder in (cached, needed)]
                raise UserError(
                    f"{self._folder}: alignment target {order} was made by another encoder or read in another way "
                    f"(cache: {names[0]}, now: {names[1]}); run `repagen cache` again with --encoder"
                )

    def _locate(self, index: int) -> tuple[int, int]:
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _file(self, number: int) -> Any:
        if number not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                self._files.pop(next(iter(self._files)))
            path = self._folder / self._shards[number]["file"]
            try:
                self._files[number] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable shard ({error}); run `repagen cache` again") from error
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # open files do not travel to loader workers


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        state = "is unfinished" if any(folder.glob("latents-*")) else "is no latent cache"
        raise UserError(f"{folder} {state}: {MANIFEST_NAME} is missing; run `repagen cache` (again)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == SHARD_FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); run `repagen cache` again") from error
    if not known:
        raise UserError(f"{path}:format: {manifest['format']} given; this version reads {SHARD_FORMAT}")
    return manifest


def _check_shard(path: Path, shard: Mapping[str, Any], verify: bool) -> None:
    if Path(shard["file"]).name != shard["file"]:
        raise UserError(f"{path}: {MANIFEST_NAME} names a shard outside its folder")
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        found = "missing" if size is None else f"{size} bytes"
        raise UserError(f"{path}: {found}, {shard['bytes']} bytes expected; remove it and run `repagen cache` again")
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard["sha256"]:
            raise UserError(f"{path}: damaged (sha256 differs); remove it and run `repagen cache` again")

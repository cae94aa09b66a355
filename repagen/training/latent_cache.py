"""Writing a latent cache: latents, labels, captions and alignment targets of a dataset, encoded once.

Shards are fixed stretches of the dataset (where images have several sizes, of those of one size), each written whole
or not at all, so that a killed run continues with the first missing shard and ends with the same bytes. With several
processes each writes its share of the shards. The manifest comes last; a folder without one is unfinished.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tqdm import tqdm

from repagen.data import ImageDataset, load_in_order
from repagen.data.shards import FLIPPED, MANIFEST_NAME, SHARD_FORMAT, LatentShards
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.files import file_digest, replace_file
from repagen.hub.places import without_names
from repagen.models.identity import describe_autoencoder, describe_encoder
from repagen.models.latents import images_to_latents, kl_statistics, require_independent_latents, require_sizes
from repagen.training.checkpoint import folder_lock
from repagen.training.latent_identity import process_group, refuse_non_finite

logger = logging.getLogger(__name__)

ShardType = Literal["float32", "bfloat16", "float16"]
_PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class CacheConfig:
    """How a cache is written.

    Attributes:
        batch_size: images per forward pass.
        shard_rows: images per shard.
        flips: store the mirrored image of each sample as well.
        dtype: type in which latents and targets are stored.
        num_workers: loader processes.
    """

    batch_size: int = 32
    shard_rows: int = 1024
    flips: bool = False
    dtype: ShardType = "float32"
    num_workers: int = 0


def cache_latents(
    autoencoder: Any,
    dataset: ImageDataset,
    output: str | Path,
    *,
    encoders: Sequence[VisionEncoder] = (),
    config: CacheConfig | None = None,
) -> LatentShards:
    """Encode a dataset once into a folder of shards; the same call again continues where a killed one stopped.

    Under a process group every process writes its share of the shards.

    Args:
        autoencoder: what `repagen.models.latents` knows, with its statistics, on its device; put in eval mode.
        dataset: the images; bad ones are left out.
        output: the folder.
        encoders: alignment encoders whose patch tokens are stored as targets, on the autoencoder's device.
        config: sizes and types.

    Returns:
        The finished cache, sizes checked.

    Raises:
        UserError: the folder holds a cache made otherwise, too many images are bad, a latent is not finite, latents
            depend on their batch, or the autoencoder or alignment encoders do not encode images of several sizes.
    """
    require_independent_latents(autoencoder, "autoencoder")
    require_sizes(autoencoder, dataset.bucket_sizes, "data.buckets")
    for encoder in encoders:
        for size in dataset.bucket_sizes:
            encoder.grid_of(size, dataset.config.image_size, "data.buckets (--encoder)")
    config = config or CacheConfig()
    folder = Path(output).expanduser()
    autoencoder.eval()
    writer = _ShardWriter(autoencoder, dataset, folder, encoders, config)
    rank, processes = process_group()
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder) if rank == 0 else nullcontext():
        if rank == 0:
            writer.begin()
        _wait(processes)
        numbers = range(rank, writer.num_shards, processes)
        for number in tqdm(numbers, desc="cache", unit="shard", disable=rank != 0):
            writer.write(number)
        _wait(processes)
        if rank == 0:
            writer.finish()
        _wait(processes)
    return LatentShards(folder, verify=False)


def require_matching_cache(shards: LatentShards, autoencoder: Any, encoders: Sequence[VisionEncoder] = ()) -> None:
    """Refuse a cache that was made with another encoder, other statistics or other alignment encoders than these.

    Raises:
        UserError: something differs; it is named.
    """
    shards.require(describe_autoencoder(autoencoder), [describe_encoder(encoder) for encoder in encoders])


class _ShardWriter:
    def __init__(
        self,
        autoencoder: Any,
        dataset: ImageDataset,
        folder: Path,
        encoders: Sequence[VisionEncoder],
        config: CacheConfig,
    ) -> None:
        self.autoencoder = autoencoder
        self.dataset = dataset
        self.folder = folder
        self.encoders = encoders
        self.config = config
        self._stretches = _stretches(dataset, config.shard_rows)
        self.num_shards = len(self._stretches)

    def plan(self) -> dict[str, Any]:
        """Return what determines the shards' bytes."""
        return {
            "format": SHARD_FORMAT,
            "autoencoder": describe_autoencoder(self.autoencoder),
            "encoders": [describe_encoder(encoder) for encoder in self.encoders],
            "dataset": {"fingerprint": self.dataset.fingerprint(), "samples": len(self.dataset)},
            "class_names": self.dataset.class_names,
            "flipped": self.config.flips,
            "dtype": self.config.dtype,
            "batch_size": self.config.batch_size,
            "shard_rows": self.config.shard_rows,
            **({"captions": True} if self.dataset.has_captions else {}),
        }

    def begin(self) -> None:
        """Record the plan, or check that the shards already here follow it."""
        plan, path = self.plan(), self.folder / _PLAN_NAME
        earlier = _read_json(self.folder / MANIFEST_NAME) or _read_json(path)
        if earlier:
            different = [key for key in plan if without_names(earlier.get(key)) != without_names(plan[key])]
            if different:
                raise UserError(
                    f"{self.folder}: holds latents made with another {', '.join(different)}; choose another --output "
                    "or remove the folder"
                )
        elif any(entry.name != "run.lock" for entry in self.folder.iterdir()):
            raise UserError(f"{self.folder}: not empty and no latent cache; choose another --output")
        else:
            _write_json(path, plan)

    @torch.no_grad()
    def write(self, number: int) -> None:
        """Write a shard and, after it, its record; a shard that fits its record is left alone."""
        path, record_path = self._shard(number), self._record_path(number)
        record = self._record(number)
        if record is not None:
            if path.is_file() and file_digest(path) == {key: record[key] for key in ("bytes", "sha256")}:
                return
            logger.warning("%s does not fit its record; it is written again", path)
        tensors = self._encode(number)
        if not tensors:  # every image of the stretch is bad
            return
        replace_file(path, partial(save_file, tensors))
        _write_json(record_path, {"file": path.name, "rows": len(tensors["label"]), **file_digest(path)})

    def finish(self) -> None:
        """Write the manifest from the plan and the shards' records, then remove these."""
        records = [record for number in range(self.num_shards) if (record := self._record(number))]
        if not records:
            raise UserError("data: no readable image; nothing to cache")
        _write_json(self.folder / MANIFEST_NAME, {**self.plan(), "shards": records})
        for number in range(self.num_shards):
            self._record_path(number).unlink(missing_ok=True)
        (self.folder / _PLAN_NAME).unlink(missing_ok=True)

    def _encode(self, number: int) -> dict[str, torch.Tensor]:
        config = self.config
        stretch = self._stretches[number]
        batches = load_in_order(self.dataset, stretch, config.batch_size, num_workers=config.num_workers)
        parts = [self._encode_batch(batch) for batch in batches]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}

    def _encode_batch(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = batch["image"].to(self.autoencoder.device)
        rows = {}
        for suffix, view in (("", images), (FLIPPED, images.flip(-1))) if self.config.flips else (("", images),):
            rows["latent" + suffix], std = _encode_images(self.autoencoder, view)
            refuse_non_finite(rows["latent" + suffix], batch["index"], self.dataset)
            if std is not None:
                rows["latent_std" + suffix] = std
            for order, encoder in enumerate(self.encoders):
                grid = encoder.grid_of(view.shape[-2:], self.dataset.config.image_size)
                rows[f"target.{order}{suffix}"] = encoder(view, grid=grid).tokens
        dtype = getattr(torch, self.config.dtype)
        stored = {name: value.to("cpu", dtype).contiguous() for name, value in rows.items()}
        return {**stored, **self._encode_captions(batch["index"]), "label": batch["label"], "index": batch["index"]}

    def _encode_captions(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """All captions of the samples, one after the other, as bytes, and how many each has; where they have any."""
        if not self.dataset.has_captions:
            return {}
        texts = [self.dataset.captions(index).to_json().encode("utf-8", "surrogatepass") for index in indices.tolist()]
        content = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
        return {"captions": content, "captions_size": torch.tensor([len(text) for text in texts])}

    def _shard(self, number: int) -> Path:
        return self.folder / f"latents-{number:05d}.safetensors"

    def _record_path(self, number: int) -> Path:
        return self._shard(number).with_suffix(".json")

    def _record(self, number: int) -> dict[str, Any] | None:
        """Return the record of a shard: of this unfinished cache, or from the manifest of a finished one."""
        name = self._shard(number).name
        finished = (_read_json(self.folder / MANIFEST_NAME) or {}).get("shards", [])
        return _read_json(self._record_path(number)) or next((r for r in finished if r["file"] == name), None)


def _stretches(dataset: ImageDataset, rows: int) -> list[Sequence[int]]:
    """=> the samples of each shard: in their order, where images have several sizes those of one after the other's."""
    groups: list[Sequence[int]] = [range(len(dataset))]
    if dataset.buckets is not None:
        buckets = range(len(dataset.bucket_sizes))
        groups = [(dataset.buckets == bucket).nonzero().flatten().tolist() for bucket in buckets]
    return [group[start : start + rows] for group in groups for start in range(0, len(group), rows)]


def _encode_images(autoencoder: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return standardised latents (B, C, h, w); of a KL autoencoder the posterior's mean and standard deviation."""
    is_kl = isinstance(autoencoder, AutoencoderKL)
    if not is_kl:
        return images_to_latents(autoencoder, images), None
    posterior = autoencoder.encode(images.to(autoencoder.dtype) * 2 - 1, return_dict=False)[0]
    shift, scale = kl_statistics(autoencoder, posterior.mean)
    return (posterior.mean - shift) / scale, posterior.std / scale


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove the folder and run `repagen cache` again") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def _wait(processes: int) -> None:
    if processes > 1:
        torch.distributed.barrier()

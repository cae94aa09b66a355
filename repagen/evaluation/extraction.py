"""One pass over a source of images: features, their moments, and a hash of the pixels, on one process or several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from repagen.errors import UserError
from repagen.evaluation.features import FeatureExtractor, full_float32
from repagen.evaluation.moments import FeatureMoments, Statistics
from repagen.evaluation.samples import ImageSource, Unreadable

_NAMES_SHOWN = 50


@dataclass(frozen=True)
class Extraction:
    """What is kept of a set of images.

    Attributes:
        statistics: of the features of all readable images.
        features: (K, D) float32 of the first K images, for metrics that need single images.
        pixels_sha256: hash of all pixels in order of index; equal for equal images, whatever files they came from.
        image_size: (height, width) in pixels.
        unreadable: the images left out.
    """

    statistics: Statistics
    features: torch.Tensor
    pixels_sha256: str
    image_size: tuple[int, int]
    unreadable: tuple[Unreadable, ...]

    @property
    def count(self) -> int:
        """Number of images behind the statistics."""
        assert self.statistics.count is not None, "moments always count"
        return self.statistics.count


@dataclass
class _Share:
    """What one process has seen: index => hash, features (of the first ones) or defect of each image."""

    moments: FeatureMoments
    first_size: dict[int, tuple[int, int]] = field(default_factory=dict)  # of its first image alone
    digests: dict[int, bytes] = field(default_factory=dict)
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    unreadable: dict[int, Unreadable] = field(default_factory=dict)


def extract(
    source: ImageSource,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 50,
    max_bad_images: int = 0,
    keep_features: int = 0,
    expected_size: tuple[int, int] | None = None,
    title: str = "features",
) -> Extraction:
    """Compute the features of every image of a source.

    Under `accelerate launch` or torchrun every process takes a share and all return the same, whole result.

    Args:
        source: the images, all of one size.
        extractor: what turns them into features.
        batch_size: images at once, per process.
        max_bad_images: how many unreadable images may be left out; one more stops the run, listing all of them.
        keep_features: keep the features of this many first images.
        expected_size: (height, width) in pixels that the images must have, those of the other side.
        title: of the progress bar.

    Raises:
        UserError: on too many unreadable images, images of another size, or a feature that is not finite; each names
            the images.
    """
    state = PartialState()
    share = _Share(FeatureMoments(extractor.dimension))
    indices = range(state.process_index, len(source), state.num_processes)
    with tqdm(total=len(indices), desc=title, unit="image", disable=not state.is_main_process) as progress:
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            _extract_batch(source, extractor, chosen, share, keep_features)
            _require_size(share.first_size, expected_size)
            if len(share.unreadable) > max_bad_images:
                raise too_many_unreadable(all_unreadable(source), max_bad_images)
            progress.update(len(chosen))
    return _join(gather_object([share]), source, max_bad_images)


def _extract_batch(
    source: ImageSource, extractor: FeatureExtractor, indices: Sequence[int], share: _Share, keep_features: int
) -> None:
    loaded = dict(zip(indices, source.load(indices), strict=True))
    images = {index: image for index, image in loaded.items() if isinstance(image, torch.Tensor)}
    share.unreadable |= {index: image for index, image in loaded.items() if isinstance(image, Unreadable)}
    if not images:
        return
    sizes = share.first_size | {index: (image.shape[1], image.shape[2]) for index, image in images.items()}
    _require_one_size(sizes, source)
    share.first_size = dict([next(iter(sizes.items()))])
    share.digests |= {index: pixel_digest(image) for index, image in images.items()}
    batch = torch.stack(list(images.values()))
    with full_float32(PartialState().device):
        features = extractor(batch).float().cpu()
    for index, row in zip(images, features, strict=True):
        if not torch.isfinite(row).all():
            raise UserError(
                f"features of {source.describe(index)} are not finite; look at that image and the extractor"
            )
        if index < keep_features:
            share.features[index] = row.clone()
    share.moments.update(features)


def pixel_digest(image: torch.Tensor) -> bytes:
    """Hash the size and the pixels of an image, uint8 (3, H, W)."""
    height_width = f"{image.shape[1]}x{image.shape[2]};".encode()
    return hashlib.sha256(height_width + image.permute(1, 2, 0).contiguous().numpy().tobytes()).digest()


def _require_one_size(sizes: dict[int, tuple[int, int]], source: ImageSource) -> None:
    if len(set(sizes.values())) > 1:
        first, *_ = sizes
        other = next(index for index in sizes if sizes[index] != sizes[first])
        shown = [f"{source.describe(index)} is {sizes[index][1]}x{sizes[index][0]}" for index in (first, other)]
        raise UserError(
            f"images differ in size: {', '.join(shown)}; crop them first, or read them with "
            "data.kind=folder data.path=FOLDER data.image_size=PIXELS"
        )


def _require_size(first_size: dict[int, tuple[int, int]], expected: tuple[int, int] | None) -> None:
    if first_size and expected and (size := next(iter(first_size.values()))) != expected:
        raise UserError(
            f"samples are {size[1]}x{size[0]}, reference images {expected[1]}x{expected[0]}; compare equal sizes, for "
            f"example --reference data.kind=folder data.path=FOLDER data.image_size={size[1]}"
        )


def all_unreadable(source: ImageSource, indices: Sequence[int] | None = None) -> list[Unreadable]:
    """Go through the images at `indices`, or through all, and return those that cannot be read."""
    loaded = (source.load([index])[0] for index in (range(len(source)) if indices is None else indices))
    return [image for image in loaded if isinstance(image, Unreadable)]


def too_many_unreadable(unreadable: Sequence[Unreadable], allowed: int) -> UserError:
    """Return the error that lists images which cannot be read."""
    shown = ", ".join(f"{image.name} ({image.reason})" for image in unreadable[:_NAMES_SHOWN])
    more = f" and {len(unreadable) - _NAMES_SHOWN} more" if len(unreadable) > _NAMES_SHOWN else ""
    return UserError(
        f"{len(unreadable)} unreadable images, {allowed} allowed: {shown}{more}; replace them, or allow them with "
        f"--max-bad-images {len(unreadable)}"
    )


def _join(shares: Sequence[_Share], source: ImageSource, max_bad_images: int) -> Extraction:
    whole = _Share(shares[0].moments)
    for number, share in enumerate(shares):
        if number:
            whole.moments.merge(share.moments)
        whole.first_size |= share.first_size
        whole.digests |= share.digests
        whole.features |= share.features
        whole.unreadable |= share.unreadable
    unreadable = tuple(whole.unreadable[index] for index in sorted(whole.unreadable))
    if len(unreadable) > max_bad_images:
        raise too_many_unreadable(unreadable, max_bad_images)
    _require_one_size(whole.first_size, source)
    kept = [whole.features[index] for index in sorted(whole.features)]
    return Extraction(
        statistics=whole.moments.statistics(),
        features=torch.stack(kept) if kept else torch.empty(0, whole.moments.mean.shape[0]),
        pixels_sha256=hashlib.sha256(b"".join(whole.digests[index] for index in sorted(whole.digests))).hexdigest(),
        image_size=next(iter(whole.first_size.values())),
        unreadable=unreadable,
    )

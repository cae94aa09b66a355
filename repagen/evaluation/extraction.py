"""One pass over a source of images: features of every space, their moments, and a hash of the pixels.

Images are numbered. A block of consecutive numbers is read, looked at by every extractor and kept on disk; on several
processes they take turns. Since networks see batches of one shape, a block comes out the same whoever makes it, and
what is computed from blocks depends on neither batch size nor process count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from repagen.errors import UserError, naming
from repagen.evaluation.extractor import FeatureExtractor, full_float32, in_fixed_batches
from repagen.evaluation.metrics.inception_score import (
    InceptionScoreSums,
    Order,
    shuffled_positions,
    split_of_position,
)
from repagen.evaluation.moments import FeatureMoments, Statistics
from repagen.evaluation.samples import ImageSource, Unreadable
from repagen.evaluation.store import FeatureBlock, FeatureStore

FORWARD_BATCH_SIZE = 32
_NAMES_SHOWN = 50


@dataclass(frozen=True)
class Needs:
    """What metrics need to know of a set of images. Features are named `space.feature`, as in `inception.pool`.

    Attributes:
        moments: features whose mean and covariance are taken over all images.
        kept: feature => so many first images whose features are kept in memory.
        scored: the logits behind the Inception Score, and its splits and order.
    """

    moments: tuple[str, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    scored: tuple[str, int, Order] | None = None


class ImageSink(Protocol):
    """Takes every readable image once, before its features are kept."""

    @property
    def place(self) -> str:
        """Where the images go; images of an interrupted pass that went elsewhere are made again."""

    def put(self, index: int, image: torch.Tensor) -> None:
        """Keep image `index`, uint8 (3, H, W)."""


@dataclass(frozen=True)
class Extraction:
    """What is known of a set of images.

    Attributes:
        statistics: feature => mean and covariance over all readable images.
        features: feature => (K, D) float32 of the first K readable images.
        score: sums of the Inception Score, where it was asked for and the images fill its splits.
        count: number of readable images.
        pixels_sha256: hash of all pixels in order of index; equal for equal images, whatever files they came from.
        image_size: (height, width) in pixels.
        unreadable: the images left out.
    """

    statistics: dict[str, Statistics]
    features: dict[str, torch.Tensor]
    score: InceptionScoreSums | None
    count: int
    pixels_sha256: str
    image_size: tuple[int, int]
    unreadable: tuple[Unreadable, ...]


@dataclass
class _Share:
    """What one process has seen; dictionaries are by number of the image."""

    moments: dict[str, FeatureMoments]
    kept: dict[str, dict[int, torch.Tensor]]
    first_size: dict[int, tuple[int, int]] = field(default_factory=dict)  # of its first image alone
    digests: dict[int, str] = field(default_factory=dict)
    unreadable: dict[int, Unreadable] = field(default_factory=dict)


def extract(
    source: ImageSource,
    extractors: Mapping[str, FeatureExtractor],
    needs: Needs,
    folder: Path,
    *,
    batch_size: int = 128,
    max_bad_images: int = 0,
    expected_size: tuple[int, int] | None = None,
    sink: ImageSink | None = None,
    title: str = "features",
    progress_bar: bool = True,
) -> Extraction:
    """Look at every image of a source once.

    Under `accelerate launch` or torchrun every process takes a share and all return the same, whole result. Where the
    folder holds blocks of an interrupted pass over the same source, they are not made again.

    Args:
        source: the images, all of one size.
        extractors: space => what turns images into features.
        needs: what to return.
        folder: for the features; memory holds those of one block, and what `needs` names. To be shared by all
            processes of a machine.
        batch_size: images in hand at once, per process, rounded up to whole forward passes of 32. No figure depends on
            it.
        max_bad_images: how many unreadable images may be left out; one more stops the pass, listing all of them.
        expected_size: (height, width) in pixels that the images must have, those of the other side.
        sink: takes the images, for example to write them out.
        title: of the progress bar.
        progress_bar: show it.

    Raises:
        UserError: on too many unreadable images, images of another size, or a feature that is not finite; each names
            the images.
    """
    state = PartialState()
    store = FeatureStore(folder, {**features_key(source, extractors), "written": sink.place if sink else None})
    share = _Share({}, {name: {} for name in needs.kept})
    shown = progress_bar and state.is_main_process
    own = list(own_blocks(len(source), batch_size))

    def look(images: Mapping[int, torch.Tensor | Unreadable]) -> FeatureBlock:
        return _look(images, source, extractors, sink)

    with naming({"": f"{title}: "}):
        with tqdm(total=len(source), desc=title, unit="image", disable=not shown) as progress:
            for blocks in own:
                for content in stored_blocks(blocks, store, source, look):
                    _require_one_size(share, content, source, expected_size)
                    _add(share, content, needs, max_bad_images)
                    if len(share.unreadable) > max_bad_images:
                        raise too_many_unreadable(all_unreadable(source), max_bad_images)
                show_progress(progress, blocks)
        whole = _join(gather_object([share]), source, max_bad_images)
        return _result(whole, needs, _score(store, source, own, whole, needs))


def features_key(source: ImageSource, extractors: Mapping[str, FeatureExtractor]) -> dict[str, Any]:
    """What the features of a source are a function of, ready for JSON."""
    return {
        "source": source.protocol,
        "origin": source.origin(),
        "extractors": {space: extractor.identity.as_dict() for space, extractor in extractors.items()},
    }


def own_blocks(count: int, batch_size: int) -> Iterator[dict[int, range]]:
    """Yield this process's blocks, as many at a time as it takes in hand: number of a block => numbers of its images.

    A block is a forward pass, so that a store written with one batch size is read with another.
    """
    state = PartialState()
    size = FORWARD_BATCH_SIZE
    in_hand = -(-batch_size // size)
    blocks = range(-(-count // size))
    for first in range(state.process_index * in_hand, len(blocks), state.num_processes * in_hand):
        chosen = blocks[first : first + in_hand]
        yield {block: range(block * size, min((block + 1) * size, count)) for block in chosen}


def show_progress(progress: tqdm, blocks: Mapping[int, range]) -> None:
    """Move a bar of images on by these blocks, and by those that the other processes have done meanwhile."""
    done = sum(len(numbers) for numbers in blocks.values()) * PartialState().num_processes
    progress.update(min(done, progress.total - progress.n))


def stored_blocks(
    blocks: Mapping[int, range],
    store: FeatureStore,
    source: ImageSource,
    look: Callable[[Mapping[int, torch.Tensor | Unreadable]], FeatureBlock],
) -> Iterator[FeatureBlock]:
    """Yield the blocks' contents, from the store or else made by `look` and put there."""
    # Taken before the images are read: where one changes meanwhile, its features are made again another time.
    states = {block: source.state(numbers) for block, numbers in blocks.items()}
    stored = {block: store.read(block, numbers, states[block]) for block, numbers in blocks.items()}
    missing = [number for block, numbers in blocks.items() if stored[block] is None for number in numbers]
    images = dict(zip(missing, source.load(missing), strict=True)) if missing else {}
    for block, numbers in blocks.items():
        content = stored[block]
        if content is None:
            content = look({number: images[number] for number in numbers})
            store.write(block, content, states[block])
        yield content


def _look(
    loaded: Mapping[int, torch.Tensor | Unreadable],
    source: ImageSource,
    extractors: Mapping[str, FeatureExtractor],
    sink: ImageSink | None,
) -> FeatureBlock:
    images = {index: image for index, image in loaded.items() if isinstance(image, torch.Tensor)}
    unreadable = {index: image for index, image in loaded.items() if isinstance(image, Unreadable)}
    if not images:
        return FeatureBlock([], {}, [], None, unreadable)
    sizes = {index: (image.shape[1], image.shape[2]) for index, image in images.items()}
    _refuse_other_sizes(sizes, source)
    indices, stacked = list(images), torch.stack(list(images.values()))
    features: dict[str, torch.Tensor] = {}
    with full_float32(PartialState().device):
        for space, extractor in extractors.items():
            rows_by_name = in_fixed_batches(extractor, stacked, FORWARD_BATCH_SIZE)
            features |= {f"{space}.{name}": rows for name, rows in rows_by_name.items()}
    for name, rows in features.items():
        _refuse_not_finite(name, rows, indices, source)
    for index, image in images.items():
        if sink is not None:
            sink.put(index, image)
    return FeatureBlock(indices, features, [pixel_digest(image) for image in stacked], sizes[indices[0]], unreadable)


def pixel_digest(image: torch.Tensor) -> str:
    """Hash the size and the pixels of an image, uint8 (3, H, W)."""
    height_width = f"{image.shape[1]}x{image.shape[2]};".encode()
    return hashlib.sha256(height_width + image.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()


def pixels_sha256(digests: Sequence[str]) -> str:
    """Hash the pixels of a set of images: equal for equal images in equal order, whatever files they came from."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _add(share: _Share, content: FeatureBlock, needs: Needs, max_bad_images: int) -> None:
    share.unreadable |= content.unreadable
    if not content.indices:
        return
    share.digests |= dict(zip(content.indices, content.digests, strict=True))
    for name in needs.moments:
        rows = content.features[name]
        if name not in share.moments:
            share.moments[name] = FeatureMoments(rows.shape[1])
        share.moments[name].update(rows)
    for name, kept in share.kept.items():
        for index, row in zip(content.indices, content.features[name], strict=True):
            if index < needs.kept[name] + max_bad_images:  # so many before it may be unreadable
                kept[index] = row.clone()  # a view would hold the whole block


def _refuse_not_finite(name: str, rows: torch.Tensor, indices: Sequence[int], source: ImageSource) -> None:
    bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"features of {source.describe(indices[bad[0]])} are not finite in {name} ({len(bad)} such images here); "
            "look at the image, or use an extractor of precision=float32"
        )


def _require_one_size(
    share: _Share, content: FeatureBlock, source: ImageSource, expected: tuple[int, int] | None
) -> None:
    if content.image_size is None:
        return
    if not share.first_size:
        share.first_size = {content.indices[0]: content.image_size}
    _refuse_other_sizes(share.first_size | {content.indices[0]: content.image_size}, source)
    if expected and content.image_size != expected:
        height, width = content.image_size
        raise UserError(
            f"images are {width}x{height}, those of the reference {expected[1]}x{expected[0]}; compare equal sizes, "
            f"for example --reference data.kind=folder data.path=FOLDER data.image_size={width}"
        )


def _refuse_other_sizes(sizes: Mapping[int, tuple[int, int]], source: ImageSource) -> None:
    if len(set(sizes.values())) > 1:
        first, *_ = sizes
        other = next(index for index in sizes if sizes[index] != sizes[first])
        shown = [f"{source.describe(index)} is {sizes[index][1]}x{sizes[index][0]}" for index in (first, other)]
        raise UserError(
            f"images differ in size: {', '.join(shown)}; crop them first, or read them with "
            "data.kind=folder data.path=FOLDER data.image_size=PIXELS"
        )


def all_unreadable(source: ImageSource, indices: Sequence[int] | None = None) -> list[Unreadable]:
    """Go through the images at `indices`, or through all, and return those that cannot be read."""
    chosen = range(len(source)) if indices is None else indices
    batches = (chosen[start : start + FORWARD_BATCH_SIZE] for start in range(0, len(chosen), FORWARD_BATCH_SIZE))
    return [image for batch in batches for image in source.load(batch) if isinstance(image, Unreadable)]


def too_many_unreadable(unreadable: Sequence[Unreadable], allowed: int) -> UserError:
    """Return the error that lists images which cannot be read."""
    return UserError(
        f"{len(unreadable)} unreadable images, {allowed} allowed: {listed(unreadable)}; replace them, or leave them "
        f"out with --max-bad {len(unreadable)}"
    )


def listed(unreadable: Sequence[Unreadable]) -> str:
    """Names and reasons of unreadable images, as one line."""
    shown = ", ".join(f"{image.name} ({image.reason})" for image in unreadable[:_NAMES_SHOWN])
    return shown + (f" and {len(unreadable) - _NAMES_SHOWN} more" if len(unreadable) > _NAMES_SHOWN else "")


def _join(shares: Sequence[_Share], source: ImageSource, max_bad_images: int) -> _Share:
    whole = _Share({}, {name: {} for name in shares[0].kept})
    for share in shares:
        for name, moments in share.moments.items():
            if name in whole.moments:
                whole.moments[name].merge(moments)
            else:
                whole.moments[name] = moments
        for name, kept in share.kept.items():
            whole.kept[name] |= kept
        whole.first_size |= share.first_size
        whole.digests |= share.digests
        whole.unreadable |= share.unreadable
    if len(whole.unreadable) > max_bad_images:
        raise too_many_unreadable(_in_order(whole.unreadable), max_bad_images)
    if len(whole.digests) < 2:
        raise UserError(
            f"an evaluation needs at least 2 readable images, got {len(whole.digests)} of {len(source)}; give more"
        )
    _refuse_other_sizes(whole.first_size, source)
    return whole


def _in_order(by_number: Mapping[int, Any]) -> list[Any]:
    return [by_number[index] for index in sorted(by_number)]


def _score(
    store: FeatureStore, source: ImageSource, own: Sequence[Mapping[int, range]], whole: _Share, needs: Needs
) -> InceptionScoreSums | None:
    """Go over the logits on disk once more: only now is it known which readable image falls into which split."""
    if needs.scored is None or len(whole.digests) < needs.scored[1]:
        return None
    name, splits, order = needs.scored
    position_of = dict(zip(sorted(whole.digests), shuffled_positions(len(whole.digests), order).tolist(), strict=True))
    sums = InceptionScoreSums(splits)
    for blocks in own:
        for block, numbers in blocks.items():
            content = store.read(block, numbers, source.state(numbers))
            if content is None:
                raise UserError(f"{store.folder}: features of block {block} vanished; run the same command again")
            if content.indices:
                positions = torch.tensor([position_of[index] for index in content.indices])
                sums.update(split_of_position(positions, len(position_of), splits), content.features[name])
    whole_sums = InceptionScoreSums(splits)
    for part in gather_object([sums]):
        whole_sums.merge(part)
    return whole_sums


def _result(whole: _Share, needs: Needs, score: InceptionScoreSums | None) -> Extraction:
    return Extraction(
        statistics={name: whole.moments[name].statistics() for name in needs.moments},
        features={name: torch.stack(_in_order(kept)[: needs.kept[name]]) for name, kept in whole.kept.items() if kept},
        score=score,
        count=len(whole.digests),
        pixels_sha256=pixels_sha256(_in_order(whole.digests)),
        image_size=next(iter(whole.first_size.values())),
        unreadable=tuple(_in_order(whole.unreadable)),
    )

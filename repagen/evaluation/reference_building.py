"""Files of reference statistics: made from images, merged from parts, or taken over from other tools."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from repagen.errors import UserError
from repagen.evaluation.encoder_extractors import FEATURE
from repagen.evaluation.extraction import FORWARD_BATCH_SIZE, Extraction, Needs, extract
from repagen.evaluation.extractor import FeatureExtractor
from repagen.evaluation.generation import image_facts
from repagen.evaluation.moments import FeatureMoments, Statistics
from repagen.evaluation.protocol import SpaceRule
from repagen.evaluation.reference import ReferenceStatistics, load_statistics, save_statistics
from repagen.evaluation.samples import ImageSource
from repagen.evaluation.store import require_own_folder
from repagen.randomness import generator_for

_WITHOUT_MOMENTS = "logits"  # they serve the Inception Score alone
STATED = "stated by the user, not verified"


def make_reference(
    path: str | Path,
    source: ImageSource,
    extractors: Mapping[str, FeatureExtractor],
    *,
    batch_size: int = 128,
    max_bad_images: int = 0,
    keep_images: int = 0,
) -> None:
    """Write means and covariances of every feature of images, in one pass; the same call continues if killed.

    Under `accelerate launch` every process takes a share of the images, and the first writes the file.

    Args:
        path: of the file; the features lie in `PATH.partial` meanwhile.
        source: real images, all of one size.
        extractors: space => what turns images into its features; see `open_extractors`.
        batch_size: images in hand at once, per process. No figure depends on it.
        max_bad_images: unreadable images allowed; they are left out and listed.
        keep_images: so many images are carried in the file for precision and recall. They are drawn at random without
            replacement (seed 0) and stay in the order of the draw, so that the first K are a random subset as well:
            folders are sorted by class.

    Raises:
        UserError: as `extract` does, for more images to keep than there are, or a path that is taken.
    """
    path = Path(path)
    require_new_npz(path)
    if keep_images > len(source):
        raise UserError(f"--keep-images {keep_images}, but there are {len(source)} images; keep fewer")
    partial = Path(f"{path}.partial")
    require_own_folder(partial)
    moments = tuple(
        f"{space}.{name}"
        for space, extractor in extractors.items()
        for name in extractor.dimensions
        if name != _WITHOUT_MOMENTS
    )
    extraction = extract(
        source, extractors, Needs(moments), partial,
        batch_size=batch_size, max_bad_images=max_bad_images, title="reference",
    )  # fmt: skip
    PartialState().wait_for_everyone()
    if not PartialState().is_main_process:
        return
    facts: dict[str, Any] = image_facts(source, extraction)
    images = None
    if keep_images:
        images = partial / "images.npy"
        kept = _draw_images(source, extraction, keep_images, images)
        facts["carried_images"] = f"{kept}, drawn at random (seed 0)"
    identities = {space: extractor.identity for space, extractor in extractors.items()}
    save_statistics(path, extraction.statistics, identities, facts, images=images)
    shutil.rmtree(partial)


def require_new_npz(path: Path, option: str = "--output") -> None:
    """Refuse a place where no file of statistics can be written.

    Raises:
        UserError: when the path is taken, or does not end with `.npz`.
    """
    if path.suffix != ".npz":
        raise UserError(f"{option} {path}: statistics are read from files that end with .npz; name it so")
    if path.exists():
        raise UserError(f"{option} {path} exists; name a new file, or remove it")


def _draw_images(source: ImageSource, extraction: Extraction, count: int, path: Path) -> int:
    """Write randomly drawn readable images into an .npy file, reading them in ascending order; => how many."""
    unreadable = {image.name for image in extraction.unreadable}
    order = torch.randperm(len(source), generator=generator_for(0, "reference images")).tolist()
    readable = (number for number in order if source.describe(number) not in unreadable)
    row_of = {number: row for row, number in enumerate(itertools.islice(readable, count))}
    shape = (len(row_of), *extraction.image_size, 3)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    numbers = sorted(row_of)
    for start in range(0, len(numbers), FORWARD_BATCH_SIZE):
        some = numbers[start : start + FORWARD_BATCH_SIZE]
        for number, image in zip(some, source.load(some), strict=True):
            if not isinstance(image, torch.Tensor):
                raise UserError(f"{image.name}: could be read before, and now not ({image.reason}); run it again")
            images[row_of[number]] = image.permute(1, 2, 0).numpy()
    images.flush()
    return len(row_of)


def merge_references(paths: Sequence[str | Path], output: str | Path) -> None:
    """Write the statistics of the union of disjoint parts, exact to rounding (Chan, Golub & LeVeque 1979).

    Images that parts carry for precision and recall are not taken over.

    Args:
        paths: two files or more, made from different images with the same extractors.
        output: the new file.

    Raises:
        UserError: for fewer than two files, other extractors, an unknown number of images, images of different sizes,
            or the same images twice.
    """
    if len(paths) < 2:
        raise UserError(f"merging takes two files or more, got {len(paths)}; name the other parts")
    require_new_npz(Path(output))
    parts = [load_statistics(path) for path in paths]
    for part in parts:
        _require_mergeable(parts[0], part)
    for first, second in itertools.combinations(parts, 2):
        _refuse_same_images(first, second)
    merged = {}
    for feature in parts[0].statistics:
        moments = FeatureMoments.of(parts[0].statistics[feature])
        for part in parts[1:]:
            moments.merge(FeatureMoments.of(part.statistics[feature]))
        merged[feature] = moments.statistics()
    facts = {"kind": "merged", "parts": [fact for part in parts for fact in _parts_of(part)]}
    if "size" in parts[0].protocol:
        facts["size"] = parts[0].protocol["size"]
    save_statistics(output, merged, parts[0].extractors, facts)


def _parts_of(reference: ReferenceStatistics) -> list[dict[str, Any]]:
    if "parts" in reference.protocol:
        return reference.protocol["parts"]
    return [{"statistics_sha256": reference.sha256, **reference.protocol}]


def _require_mergeable(first: ReferenceStatistics, part: ReferenceStatistics) -> None:
    if not part.extractors:
        raise UserError(
            f"{part.path}: does not say which extractor made it; parts are made with `repagen reference make`"
        )
    for feature, statistics in part.statistics.items():
        if statistics.count is None:
            raise UserError(
                f"{part.path}: does not say of how many images {feature} is, so it cannot be weighed; make it with "
                "`repagen reference make`"
            )
    if part.statistics.keys() != first.statistics.keys():
        features = [", ".join(sorted(one.statistics)) for one in (part, first)]
        raise UserError(
            f"{part.path}: holds {features[0]}, but {first.path} holds {features[1]}; merge equal features"
        )
    for space, identity in first.extractors.items():
        part.require_extractor(space, identity)
    sizes = [one.protocol.get("size") for one in (part, first)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{part.path}: of images of {sizes[0]}, but {first.path} of {sizes[1]}; merge equal sizes")


def _refuse_same_images(first: ReferenceStatistics, second: ReferenceStatistics) -> None:
    hashes = [{fact.get("pixels_sha256") for fact in _parts_of(part)} - {None} for part in (first, second)]
    equal = all(torch.equal(one.mean, second.statistics[feature].mean) for feature, one in first.statistics.items())
    if hashes[0] & hashes[1] or equal:
        raise UserError(f"{first.path} and {second.path} hold the same images; they would count twice: leave one out")


def import_statistics(
    paths: Sequence[str | Path],
    rules: Sequence[SpaceRule],
    extractors: Mapping[str, FeatureExtractor],
    output: str | Path,
    *,
    num_images: int | None = None,
) -> None:
    """Write statistics of other tools as if these extractors had made them, on the user's word.

    Of FD-Loss's two poolings of a transformer, a rule with `pooling: mean` takes `avg_mu`, another one `mu`.

    Args:
        paths: files of other tools.
        rules: the space of each file.
        extractors: space => the extractor that is said to have made it.
        output: the new file; it records that the statement is not verified, and the sha256 of every source.
        num_images: behind the statistics, where it is known.

    Raises:
        UserError: for a file that says itself what made it, or another number of features than the extractor's.
    """
    require_new_npz(Path(output))
    if len(paths) != len(rules):
        raise UserError(f"{len(paths)} files and {len(rules)} spaces; name one --space for each file, in order")
    if num_images is not None and num_images < 2:
        raise UserError(f"--num-images must be at least 2, got {num_images}")
    statistics: dict[str, Statistics] = {}
    sources = {}
    for path, rule in zip(paths, rules, strict=True):
        foreign = load_statistics(path)
        if foreign.layout == "repagen":
            raise UserError(f"{path}: says itself what made it; use it as it is")
        for feature, one in _features_for(rule, foreign).items():
            needed = extractors[rule.name].dimensions[feature]
            if one.dimension != needed:
                raise UserError(
                    f"{path}: holds {one.dimension} features, but {extractors[rule.name].identity} gives {needed}; "
                    "name the space that made them"
                )
            statistics[f"{rule.name}.{feature}"] = Statistics(one.mean, one.covariance, num_images)
        sources[rule.name] = {"path": str(path), "sha256": foreign.sha256, "layout": foreign.layout}
    facts = {"kind": "imported", "identity": STATED, "sources": sources}
    save_statistics(output, statistics, {rule.name: extractors[rule.name].identity for rule in rules}, facts)


def _features_for(rule: SpaceRule, foreign: ReferenceStatistics) -> dict[str, Statistics]:
    """Which of a foreign file's statistics are those of a space; => by name of the feature there."""
    if rule.extractor.kind == "inception":
        if foreign.layout == "FD-Loss":
            raise UserError(f"{foreign.path}: avg_mu says that a transformer made it, not Inception; name its space")
        return {feature.split(".")[1]: one for feature, one in foreign.statistics.items()}
    mean = foreign.statistics.get("unnamed.mean") if rule.extractor.pooling == "mean" else None
    return {FEATURE: mean or next(iter(foreign.statistics.values()))}

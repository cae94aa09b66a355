"""Whether a dataset is fit for training: every file is decoded and cropped as training would."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from repagen.data import DataConfig, ImageDataset, SampleDataset, open_dataset
from repagen.data.buckets import describe_buckets
from repagen.data.captions import NO_CAPTION, MissingRule
from repagen.data.folders import FolderDataset, list_images
from repagen.data.images import BadImageError
from repagen.doctor.report import Finding, Level, Section
from repagen.errors import UserError
from repagen.files import printable

_THREADS = 8  # Pillow decodes without the interpreter's lock
_BLOCK = 1024  # images in hand at once
_NAMED = 20  # lines of names in the text; the JSON file has all
_ANY_NUMBER = 2**62


@dataclass(frozen=True, slots=True)  # there may be millions
class _Image:
    """What one file holds: width, height and a hash of its pixels; or why it cannot be used."""

    index: int
    size: tuple[int, int] = (0, 0)
    sha256: bytes = b""
    defect: str = ""


def check_dataset(config: DataConfig) -> Section:
    """Open a dataset and go through all of it. What keeps it from being opened is a finding, too.

    Behind a wrong layout of a folder, everything in its class folders is still looked at.
    """
    refused: list[UserError] = []
    dataset: SampleDataset | None = None
    try:
        captions = replace(config.captions, missing="empty") if config.captions else None
        lenient = replace(config, max_bad_images=_ANY_NUMBER, captions=captions)
        lenient.validate()
        dataset = FolderDataset(lenient, refused.append) if config.kind == "folder" else open_dataset(lenient)
    except UserError as error:
        refused.append(error)
    layout = [Finding("dataset", str(error), "problem") for error in refused]
    if dataset is None:
        return Section("Dataset", layout)
    if not isinstance(dataset, ImageDataset):
        return Section("Dataset", [Finding("samples", f"{len(dataset)}, {dataset.num_classes} classes; no images")])
    images = list(_inspect_all(dataset))
    sound = [image for image in images if not image.defect]
    findings = [*layout, *_classes(dataset), *_unread_formats(config), _broken(dataset, images, config.max_bad_images)]
    if dataset.buckets is not None:
        counts = describe_buckets(dataset.buckets, dataset.bucket_sizes)
        findings.append(Finding("buckets", f"images per height x width: {counts}"))
    if config.captions is not None:
        findings.append(_captions(dataset, config.captions.missing))
    if sound:
        findings += [_sizes(sound, config.image_size), _duplicates(dataset, sound)]
    return Section("Dataset", findings)


def _inspect_all(dataset: ImageDataset) -> Iterable[_Image]:
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(dataset), desc="images", unit="image") as progress:
        for start in range(0, len(dataset), _BLOCK):
            for image in pool.map(lambda i: _inspect(dataset, i), range(start, min(start + _BLOCK, len(dataset)))):
                progress.update()
                yield image


def _inspect(dataset: ImageDataset, index: int) -> _Image:
    try:
        image = dataset.original(index)
        dataset.crop(image, dataset.size(index))
    except BadImageError as error:
        return _Image(index, defect=str(error))
    return _Image(index, image.size, hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest())


def _classes(dataset: SampleDataset) -> list[Finding]:
    count = dataset.num_classes
    facts = {"images": len(dataset), "classes": count}
    if not count:
        return [Finding("images", f"{len(dataset)}, without classes", facts=facts)]
    labels: torch.Tensor = dataset.labels  # type: ignore[attr-defined]  # of every dataset of images
    counts = torch.bincount(labels, minlength=count)
    least, most = int(counts.argmin()), int(counts.argmax())
    ratio = f"{int(counts[most]) / int(counts[least]):.3g} : 1" if counts[least] else "some classes are empty"
    balance = (
        f"{int(counts[least])} to {int(counts[most])} a class, median {statistics.median(counts.tolist()):g}; largest "
        f"{dataset.class_names[most]!r}, smallest {dataset.class_names[least]!r}, {ratio}"
    )
    names = ", ".join(dataset.class_names[:_NAMED]) + (" ..." if count > _NAMED else "")
    per_class = dict(zip(dataset.class_names, counts.tolist(), strict=True))
    empty: Level = "ok" if counts[least] else "problem"
    return [
        Finding("images", f"{len(dataset)} in {count} classes", facts=facts),
        Finding("classes", names, facts={"names": dataset.class_names}),
        Finding("balance", balance, "note" if counts[most] > 10 * counts[least] > 0 else empty, facts=per_class),
    ]


def _unread_formats(config: DataConfig) -> list[Finding]:
    if config.kind != "folder":
        return []
    _, unread = list_images(Path(config.path or "").expanduser())
    if not unread:
        return [Finding("formats", "all are read")]
    text = f"{len(unread)} files are of formats that are not read; convert or remove them"
    level: Level = "problem" if len(unread) > config.max_bad_images else "note"
    return [_named("formats", text, level, [printable(path) for path in unread])]


def _broken(dataset: ImageDataset, images: Sequence[_Image], allowed: int) -> Finding:
    broken = [f"{printable(dataset.describe(image.index))}: {image.defect}" for image in images if image.defect]
    if not broken:
        return Finding("broken images", "none; every one was decoded and cropped")
    text = f"{len(broken)} of {len(images)}; repair or remove them (data.max_bad_images={allowed})"
    return _named("broken images", text, "problem" if len(broken) > allowed else "note", broken)


def _sizes(images: Sequence[_Image], image_size: int) -> Finding:
    short = torch.tensor([min(image.size) for image in images])
    square = sum(image.size[0] == image.size[1] for image in images)
    quantiles = torch.quantile(short[:: max(1, len(short) // 10**6)].double(), torch.tensor([0.1, 0.5, 0.9]).double())
    low, median, high = (round(value) for value in quantiles.tolist())
    small = int((short < image_size).sum())
    text = (
        f"short side {short.min()} to {short.max()} px (10 %: {low}, median {median}, 90 %: {high}), {square} of "
        f"{len(images)} are square"
    )
    enlarged = f"smaller than data.image_size={image_size}, and enlarged in training: {small}"
    facts = {"shortest": int(short.min()), "median": median, "longest": int(short.max()), "too_small": small}
    return Finding("sizes", text, "note" if small else "ok", [enlarged] if small else [], facts)


def _captions(dataset: ImageDataset, rule: MissingRule) -> Finding:
    """How many images have one, how long they are, and how often one stands for several images."""
    found = [dataset.captions(index) for index in range(len(dataset))]
    missing = [printable(dataset.describe(index)) for index, captions in enumerate(found) if captions == NO_CAPTION]
    lengths = sorted(len(text) for captions in found if captions != NO_CAPTION for text in captions.texts)
    shared = Counter(captions.draw() for captions in found if captions != NO_CAPTION)
    repeated = sum(count for count in shared.values() if count > 1)
    text = f"{len(lengths)} for {len(found) - len(missing)} of {len(found)} images"
    if lengths:
        text += f", {lengths[0]} to {lengths[-1]} characters, median {statistics.median(lengths):g}"
    text += f"; images whose caption others have too: {repeated}" if repeated else ""
    if not missing:
        return Finding("captions", text, "note" if repeated else "ok", facts={"captions": len(lengths)})
    level: Level = "problem" if rule == "refuse" or not lengths else "note"
    return _named("captions", f"{text}; without one (data.captions.missing={rule}):", level, missing)


def _duplicates(dataset: ImageDataset, images: Sequence[_Image]) -> Finding:
    """Equal pixels, whatever the format of the file; one picture in two classes says two things at once."""
    groups: dict[bytes, list[int]] = {}
    for image in images:
        groups.setdefault(image.sha256, []).append(image.index)
    repeated = [indices for indices in groups.values() if len(indices) > 1]
    if not repeated:
        return Finding("duplicates", "none")
    crossing = [indices for indices in repeated if len({int(dataset.labels[index]) for index in indices}) > 1]
    text = f"copies of other images: {sum(map(len, repeated)) - len(repeated)}"
    text += f"; pictures in several classes: {len(crossing)}" if crossing else ", each within its class"
    lines = [" = ".join(printable(dataset.describe(index)) for index in indices) for indices in crossing or repeated]
    return _named("duplicates", text, "problem" if crossing else "note", lines)


def _named(name: str, text: str, level: Level, names: Sequence[str]) -> Finding:
    more = [f"and {len(names) - _NAMED} more; --json FILE lists all"] if len(names) > _NAMED else []
    return Finding(name, text, level, [*names[:_NAMED], *more], {"count": len(names), "all": list(names)})

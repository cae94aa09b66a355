"""How far reconstructions are from their originals: one pass over the images, on one process or several.

Each original, uint8 as its source gives it, is encoded and decoded, and the reconstruction is rounded to uint8 as a
saved image would be. All metrics see these two: PSNR, SSIM and LPIPS pair by pair, rFID the features of both sides.
The rFID of an autoencoder compares reconstructions with the same originals (arXiv 2510.11690), never with statistics
of other images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from tqdm import tqdm

from repagen.errors import UserError, refusing
from repagen.evaluation.extraction import (
    FORWARD_BATCH_SIZE,
    all_unreadable,
    listed,
    pixel_digest,
    pixels_sha256,
    too_many_unreadable,
)
from repagen.evaluation.extractor import ExtractorIdentity, FeatureExtractor, full_float32, in_fixed_batches
from repagen.evaluation.inception import INCEPTION
from repagen.evaluation.metrics.frechet import frechet_distance
from repagen.evaluation.metrics.perceptual import PerceptualDistance
from repagen.evaluation.moments import FeatureMoments
from repagen.evaluation.reconstruction.pixel_metrics import peak_signal_to_noise_ratio, structural_similarity
from repagen.evaluation.reconstruction.result import (
    ImageFigures,
    Metric,
    PairedMetric,
    ReconstructionResult,
    spreads,
)
from repagen.evaluation.reference import ReferenceStatistics
from repagen.evaluation.reporting import distance_remarks, software_versions
from repagen.evaluation.samples import ImageSource, NpzImages, Unreadable, npz_keys, to_uint8
from repagen.models.fingerprint import autoencoder_sha256
from repagen.models.latents import (
    decoded_size,
    images_to_latents,
    latent_shape,
    latents_to_images,
    require_autoencoder,
    require_independent_latents,
)
from repagen.randomness import generator_for

DEFAULT_METRICS: tuple[Metric, ...] = ("psnr", "ssim", "rfid")  # RAE's

Comparison = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Originals and reconstructions, (B, 3, H, H) float in [0, 1] => (B,)."""


def evaluate_reconstruction(
    autoencoder: Any,
    source: ImageSource,
    *,
    metrics: Sequence[Metric] = DEFAULT_METRICS,
    extractor: FeatureExtractor | None = None,
    perceptual: PerceptualDistance | None = None,
    batch_size: int = 128,
    max_bad_images: int = 0,
    num_images: int | None = None,
    seed: int = 0,
) -> ReconstructionResult:
    """Reconstruct images and compare each, and all of them, with the originals.

    There is no chance in it: the autoencoder is put into eval mode, in which RAE adds no noise, and of
    `AutoencoderKL`'s posterior the mode is taken. Under `accelerate launch` the processes take turns with batches, and
    all return the same result, that of one process.

    Args:
        autoencoder: as in `repagen.images_to_latents`, on the device that shall compute.
        source: the originals, square and of the side that the autoencoder encodes.
        metrics: what to compute. The mean over images of `psnr` (dB), `ssim`, `lpips`; and `rfid`.
        extractor: of the features for `rfid`: Inception for figures beside published ones, or any encoder.
        perceptual: the network for `lpips`.
        batch_size: images in hand at once, per process; networks see 32 of them, and no figure depends on it.
        max_bad_images: unreadable images allowed; they are left out and listed.
        num_images: this many images, drawn without replacement by `seed`; None: all.
        seed: of that draw.

    Raises:
        UserError: on a metric without its network; on statistics in place of originals; on images that cannot be
            read, are not square, or of a side that the autoencoder does not take; on reconstructions, figures or
            features that are not finite; on fewer than two images. Each names the image.
    """
    began = time.perf_counter()
    source = require_originals(source)
    require_autoencoder(autoencoder, "autoencoder")
    require_independent_latents(autoencoder, "autoencoder")
    comparisons = pair_comparisons(metrics, perceptual, autoencoder.device)
    autoencoder.eval()
    indices = _chosen(len(source), num_images, seed)
    side = _image_side(autoencoder, source, indices)
    refuse_too_small(comparisons, side, autoencoder.device)
    task = _Task(autoencoder, source, comparisons, _extractor_of(metrics, extractor), side)
    whole = _join(gather_object([_run_share(task, indices, batch_size, max_bad_images)]))
    unreadable = [whole.unreadable[index] for index in sorted(whole.unreadable)]
    if len(unreadable) > max_bad_images:
        raise too_many_unreadable(unreadable, max_bad_images)
    if len(whole.digests) < 2:
        raise UserError(f"reconstruction needs at least 2 images that can be read, got {len(whole.digests)}; add some")
    drawn = {"drawn": f"{len(indices)} of {len(source)}, seed {seed}"} if len(indices) < len(source) else {}
    return _result(task, whole, drawn, perceptual, began)


@torch.no_grad()
def reconstruct(autoencoder: Any, originals: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """Encode and decode images without chance, in full float32 where that is the autoencoder's dtype.

    Args:
        autoencoder: as in `repagen.images_to_latents`, in eval mode.
        originals: uint8 (B, 3, H, H).
        names: of the images, for messages.

    Returns:
        uint8 (B, 3, H, H) on the CPU, rounded.

    Raises:
        UserError: when a reconstruction has pixels that are not finite.
    """
    device = autoencoder.device

    def run(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        latents = images_to_latents(autoencoder, batch.to(device).float() / 255, sample_posterior=False)
        return {"images": latents_to_images(autoencoder, latents, clamp=False)}

    with full_float32(device):
        images = in_fixed_batches(run, originals, FORWARD_BATCH_SIZE)["images"]
    broken = (~torch.isfinite(images)).flatten(1).any(dim=1).tolist()
    if any(broken):
        raise UserError(
            f"the reconstruction of {names[broken.index(True)]} has pixels that are not finite; look at that image, "
            "and at the autoencoder's weights and dtype"
        )
    return to_uint8(images)


# --- what is asked for ---------------------------------------------------------------------------------------------


def require_originals(source: ImageSource | ReferenceStatistics) -> ImageSource:
    """Return a source of images; refuse statistics, and the images that ADM's files carry beside them.

    Raises:
        UserError: it is a file of statistics; says why rFID is not measured against one.
    """
    if isinstance(source, ReferenceStatistics) or (
        isinstance(source, NpzImages) and any(key.startswith(("mu", "sigma")) for key in npz_keys(source.path))
    ):
        raise UserError(
            f"{source.path}: holds statistics, but rFID compares reconstructions with the same originals, image by "
            "image. ADM's npz describes training images and would give 1.9 where 0.57 is right, and its arr_0 holds "
            "10,000 images for precision and recall only; give the originals themselves, as a folder or "
            "data.KEY=VALUE, or use `repagen evaluate generation` for a distance to statistics"
        )
    return source


def pair_comparisons(
    metrics: Sequence[Metric], perceptual: PerceptualDistance | None, device: torch.device
) -> dict[PairedMetric, Comparison]:
    """Return the functions behind metrics of single images.

    Args:
        metrics: their names; `rfid` is passed over, since it is one of all images together.
        perceptual: the network of `lpips`.
        device: where it computes.

    Raises:
        UserError: an unknown metric, none, or `lpips` without its network.
    """
    known: dict[PairedMetric, Comparison | None] = {
        "psnr": peak_signal_to_noise_ratio,
        "ssim": structural_similarity,
        "lpips": perceptual.to(device) if perceptual else None,
    }
    unknown = [metric for metric in metrics if metric not in (*known, "rfid")]
    if unknown or not metrics:
        raise UserError(f"metrics: {unknown[0] if unknown else 'none'} given; allowed: {', '.join(known)}, rfid")
    if "lpips" in metrics and perceptual is None:
        raise UserError("metrics: lpips needs its network; give perceptual=PerceptualDistance.from_files(...)")
    return {metric: function for metric, function in known.items() if metric in metrics and function}


def _extractor_of(metrics: Sequence[Metric], extractor: FeatureExtractor | None) -> FeatureExtractor | None:
    if "rfid" in metrics and extractor is None:
        raise UserError("metrics: rfid needs an extractor; give extractor=InceptionExtractor(), or leave rfid out")
    return extractor if "rfid" in metrics else None


def _chosen(available: int, wanted: int | None, seed: int) -> list[int]:
    count = available if wanted is None else wanted
    if not 2 <= count <= available:
        raise UserError(
            f"reconstruction of {count} images asked for, the source has {available}; allowed: from 2 to all of them"
        )
    if count == available:
        return list(range(available))
    order = torch.randperm(available, generator=generator_for(seed, "reconstruction images"))
    return sorted(order[:count].tolist())


def _image_side(autoencoder: Any, source: ImageSource, indices: Sequence[int]) -> int:
    """Return the side in pixels of the first readable image, after checking that the autoencoder takes it."""
    loaded = ((index, source.load([index])[0]) for index in indices)
    found = next(((index, image) for index, image in loaded if isinstance(image, torch.Tensor)), None)
    if found is None:
        unreadable = listed(all_unreadable(source, indices))
        raise UserError(f"none of the {len(indices)} images can be read: {unreadable}; replace them")
    index, image = found
    _, height, width = image.shape
    if height != width:
        raise _wrong_size(source, index, image, "autoencoders here take square images")
    try:
        decoded = decoded_size(autoencoder, latent_shape(autoencoder, width))
    except UserError as error:
        raise _wrong_size(source, index, image, str(error)) from error
    if decoded != (height, width):
        raise _wrong_size(source, index, image, f"the autoencoder decodes it to {decoded[1]}x{decoded[0]}")
    return width


def _wrong_size(source: ImageSource, index: int, image: torch.Tensor, reason: str) -> UserError:
    return UserError(
        f"{source.describe(index)} is {image.shape[2]}x{image.shape[1]}: {reason}; give images of that size, for "
        "example data.kind=folder data.path=FOLDER data.image_size=PIXELS, which crops and resizes"
    )


def refuse_too_small(comparisons: Mapping[PairedMetric, Comparison], side: int, device: torch.device) -> None:
    """Ask the comparisons for images of a side, before anything is made: SSIM and LPIPS take none below some size.

    Raises:
        UserError: naming the metric.
    """
    blank = torch.zeros(1, 3, side, side, device=device)
    for metric, compare in comparisons.items():
        with refusing(f"metrics: {metric} cannot compare images of {side} px; leave it out"), torch.no_grad():
            compare(blank, blank)


# --- the pass ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What is done with every batch."""

    autoencoder: Any
    source: ImageSource
    comparisons: Mapping[PairedMetric, Comparison]
    extractor: FeatureExtractor | None
    side: int

    @property
    def spaces(self) -> dict[str, ExtractorIdentity]:
        """Spaces in which rFID is measured => who makes their features. With `features` the place that knows how."""
        return {self._space: self.extractor.identity} if self.extractor else {}

    @property
    def _space(self) -> str:
        return "inception" if self.extractor and self.extractor.identity.name == INCEPTION else "encoder"

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 (B, 3, H, H) => features (B, D) float32 on the CPU, by space."""
        if self.extractor is None:
            return {}
        with full_float32(PartialState().device):
            features = in_fixed_batches(self.extractor, images, FORWARD_BATCH_SIZE)
        return {self._space: next(iter(features.values())).float()}  # the first: Inception's pooled ones


@dataclass
class _Share:
    """What one process has seen: index => figures, hashes of original and reconstruction, or defect of each image."""

    originals: dict[str, FeatureMoments] = field(default_factory=dict)
    reconstructions: dict[str, FeatureMoments] = field(default_factory=dict)
    figures: dict[int, dict[PairedMetric, float]] = field(default_factory=dict)
    digests: dict[int, tuple[str, str]] = field(default_factory=dict)
    unreadable: dict[int, Unreadable] = field(default_factory=dict)

    def pixels_sha256(self, side: int) -> str:
        """Hash all originals (0) or all reconstructions (1)."""
        return pixels_sha256([self.digests[index][side] for index in sorted(self.digests)])


def _run_share(task: _Task, indices: Sequence[int], batch_size: int, max_bad_images: int) -> _Share:
    """Go through this process's batches. Batches are shared out in turn."""
    state = PartialState()
    share = _Share()
    starts = range(state.process_index * batch_size, len(indices), state.num_processes * batch_size)
    with tqdm(total=len(indices), desc="reconstructions", unit="image", disable=not state.is_main_process) as progress:
        for start in starts:
            _run_batch(task, indices[start : start + batch_size], share)
            if len(share.unreadable) > max_bad_images:
                raise too_many_unreadable(all_unreadable(task.source, indices), max_bad_images)
            progress.update(min(state.num_processes * batch_size, len(indices) - start))
    return share


def _run_batch(task: _Task, indices: Sequence[int], share: _Share) -> None:
    loaded = dict(zip(indices, task.source.load(indices), strict=True))
    share.unreadable |= {index: image for index, image in loaded.items() if isinstance(image, Unreadable)}
    images = {index: image for index, image in loaded.items() if isinstance(image, torch.Tensor)}
    for index, image in images.items():
        if image.shape[1:] != (task.side, task.side):
            raise _wrong_size(task.source, index, image, f"others are {task.side}x{task.side}")
    if not images:
        return
    names = [task.source.describe(index) for index in images]
    originals = torch.stack(list(images.values()))
    reconstructions = reconstruct(task.autoencoder, originals, names)
    for moments, pictures, side in (
        (share.originals, originals, ""),
        (share.reconstructions, reconstructions, "the reconstruction of "),
    ):
        _add_features(moments, task.features(pictures), [side + name for name in names])
    figures = compare_pairs(task.comparisons, task.autoencoder.device, originals, reconstructions, names)
    share.figures |= dict(zip(images, figures, strict=True))
    share.digests |= {
        index: (pixel_digest(original), pixel_digest(reconstruction))
        for index, original, reconstruction in zip(images, originals, reconstructions, strict=True)
    }


def _add_features(
    moments: dict[str, FeatureMoments], features: Mapping[str, torch.Tensor], names: Sequence[str]
) -> None:
    for space, rows in features.items():
        broken = (~torch.isfinite(rows).all(dim=1)).tolist()
        if any(broken):
            raise UserError(
                f"features of {names[broken.index(True)]} are not finite; look at that image and the extractor {space}"
            )
        moments.setdefault(space, FeatureMoments(rows.shape[1])).update(rows)


@torch.no_grad()
def compare_pairs(
    comparisons: Mapping[PairedMetric, Comparison],
    device: torch.device,
    originals: torch.Tensor,
    reconstructions: torch.Tensor,
    names: Sequence[str],
) -> list[dict[PairedMetric, float]]:
    """Return the figures of each image.

    Args:
        comparisons: of `pair_comparisons`.
        device: where they compute.
        originals, reconstructions: uint8 (B, 3, H, H).
        names: of the images, for messages.

    Raises:
        UserError: a figure is not finite.
    """

    def run(pairs: torch.Tensor) -> dict[str, torch.Tensor]:
        sides = (pairs.to(device).float() / 255).chunk(2, dim=1)
        return {metric: compare(*sides) for metric, compare in comparisons.items()}

    with full_float32(device):
        columns = in_fixed_batches(run, torch.cat([originals, reconstructions], dim=1), FORWARD_BATCH_SIZE)
    for metric, values in columns.items():
        broken = (~torch.isfinite(values)).tolist()
        if any(broken):
            name = names[broken.index(True)]
            raise UserError(f"{metric} of {name} is not finite; look at that image, and at the metric's weights")
    return [{metric: columns[metric][row].item() for metric in comparisons} for row in range(len(originals))]


def _join(shares: Sequence[_Share]) -> _Share:
    whole = _Share()
    for share in shares:
        for into, moments in (
            (whole.originals, share.originals),
            (whole.reconstructions, share.reconstructions),
        ):
            for space, part in moments.items():
                if space in into:
                    into[space].merge(part)
                else:
                    into[space] = part
        whole.figures |= share.figures
        whole.digests |= share.digests
        whole.unreadable |= share.unreadable
    return whole


# --- the result ----------------------------------------------------------------------------------------------------


def _result(
    task: _Task, whole: _Share, drawn: dict[str, str], perceptual: PerceptualDistance | None, began: float
) -> ReconstructionResult:
    count = len(whole.digests)
    columns: dict[PairedMetric, torch.Tensor] = {
        metric: torch.tensor([whole.figures[index][metric] for index in sorted(whole.figures)], dtype=torch.float64)
        for metric in task.comparisons
    }
    metrics: dict[Metric, float] = {metric: values.mean().item() for metric, values in columns.items()}
    remarks: tuple[str, ...] = ()
    for space, identity in task.spaces.items():
        statistics = whole.originals[space].statistics(), whole.reconstructions[space].statistics()
        metrics["rfid"] = frechet_distance(*statistics)
        remarks += distance_remarks({"images": count}, statistics[0].dimension, identity)
    return ReconstructionResult(
        metrics=metrics,
        spread=spreads(columns),
        num_samples=count,
        spaces=task.spaces,
        definitions=_definitions(task, perceptual),
        samples=_reconstruction_facts(task, whole),
        reference={**task.source.protocol, **drawn, **_original_facts(task, whole)},
        remarks=remarks,
        versions=software_versions(*(["torchmetrics"] if "ssim" in columns else [])),
        per_image=tuple(
            ImageFigures(index, task.source.describe(index), whole.figures[index])
            for index in (sorted(whole.figures) if columns else ())
        ),
        wall_time_s=time.perf_counter() - began,
    )


def _definitions(task: _Task, perceptual: PerceptualDistance | None) -> dict[PairedMetric, str]:
    definitions: dict[PairedMetric, str] = {
        "psnr": "of each image, not of the pooled error; at most 100 dB",
        "ssim": "torchmetrics: Gaussian window of 11 px, sigma 1.5, range 1",
    }
    if perceptual:
        files = ", ".join(f"{name} {digest[:12]}" for name, digest in perceptual.files.items())
        definitions["lpips"] = f"v0.1, {perceptual.backbone}{f', weights {files}' if files else ''}"
    return {metric: definitions[metric] for metric in task.comparisons}


def _reconstruction_facts(task: _Task, whole: _Share) -> dict[str, Any]:
    autoencoder = task.autoencoder
    return {
        "kind": "reconstruction",
        "autoencoder": type(autoencoder).__name__,
        "path": autoencoder.config.get("_name_or_path"),
        "weights_sha256": autoencoder_sha256(autoencoder),
        "dtype": str(autoencoder.dtype).removeprefix("torch."),
        "latents": "mode of the posterior" if isinstance(autoencoder, AutoencoderKL) else "without noise",
        "uint8": "rounded",
        "size": f"{task.side}x{task.side}",
        "pixels_sha256": whole.pixels_sha256(1),
    }


def _original_facts(task: _Task, whole: _Share) -> dict[str, Any]:
    left_out = [whole.unreadable[index].name for index in sorted(whole.unreadable)]
    return {
        "size": f"{task.side}x{task.side}",
        "pixels_sha256": whole.pixels_sha256(0),
        **({"left_out": left_out} if left_out else {}),
    }

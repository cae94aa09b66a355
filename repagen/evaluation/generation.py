"""How far generated images are from real ones, by a protocol."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from repagen.errors import UserError, naming
from repagen.evaluation.encoder_extractors import open_extractor
from repagen.evaluation.extraction import Extraction, ImageSink, extract
from repagen.evaluation.extraction_file import extract_once
from repagen.evaluation.extractor import ExtractorIdentity, FeatureExtractor
from repagen.evaluation.measures import Figures, Side, feature_of, measure, needs_of
from repagen.evaluation.metrics.ratios import Normaliser, frechet_distance_ratio
from repagen.evaluation.moments import Statistics
from repagen.evaluation.pipeline_images import DrawnImages
from repagen.evaluation.processes import kept_or_temporary
from repagen.evaluation.protocol import EvaluationProtocol, MetricName, metric_names
from repagen.evaluation.reference import ReferenceStatistics
from repagen.evaluation.reporting import distance_remarks, software_versions
from repagen.evaluation.result import GenerationResult
from repagen.evaluation.samples import ImageSource


@dataclass(frozen=True)
class KnownReference:
    """A reference that was looked at, to be compared with samples any number of times.

    Attributes:
        given: the images or statistics.
        images: what is known of its images; None for statistics alone.
    """

    given: ImageSource | ReferenceStatistics
    images: Extraction | None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of the images behind it; None where a file does not say it."""
        if self.images is not None:
            return self.images.image_size
        size = self.given.protocol.get("size")
        if size is None:
            return None
        width, height = (int(side) for side in str(size).split("x"))
        return height, width

    @property
    def side(self) -> Side:
        """What metrics look at."""
        given, images = self.given, self.images
        statistics = given.statistics if isinstance(given, ReferenceStatistics) else None
        return Side(statistics or (images.statistics if images else {}), images.features if images else {})


def look_at_reference(
    reference: ImageSource | ReferenceStatistics,
    protocol: EvaluationProtocol,
    extractors: Mapping[str, FeatureExtractor],
    folder: Path,
    *,
    name: str = "custom",
    batch_size: int = 128,
    max_bad_images: int = 0,
    progress_bar: bool = True,
    keep: bool = False,
) -> KnownReference:
    """Check a reference, and look at its images where a protocol asks for more than its statistics.

    Args:
        reference, protocol, extractors, name, batch_size, max_bad_images, progress_bar: see `evaluate_generation`.
        folder: for features; see `extract`.
        keep: leave what is found in the folder, where a later call finds it; see `extract_once`.

    Raises:
        UserError: as `evaluate_generation` does about a reference.
    """
    require_reference(protocol, name, reference)
    images = reference.images if isinstance(reference, ReferenceStatistics) else reference
    needs = needs_of(protocol, dimensions_of(extractors), reference=True)
    if isinstance(reference, ReferenceStatistics):
        require_statistics(protocol, reference, extractors)
        needs = dataclasses.replace(needs, moments=())  # images beside it serve metrics of single images alone
    if images is None or not (needs.kept or needs.moments):
        return KnownReference(reference, None)
    look = extract_once if keep else extract
    return KnownReference(
        reference,
        look(
            images, extractors, needs, folder,
            batch_size=batch_size, max_bad_images=max_bad_images, title="reference", progress_bar=progress_bar,
        ),
    )  # fmt: skip


def evaluate_generation(
    samples: ImageSource,
    reference: ImageSource | ReferenceStatistics | KnownReference,
    protocol: EvaluationProtocol,
    extractors: Mapping[str, FeatureExtractor],
    *,
    name: str = "custom",
    normalisers: Mapping[str, Normaliser] | None = None,
    batch_size: int = 128,
    max_bad_images: int = 0,
    folder: str | Path | None = None,
    sink: ImageSink | None = None,
    progress_bar: bool = True,
) -> GenerationResult:
    """Compare samples with a reference, in one pass over the images of each side.

    Under `accelerate launch` every process takes a share of the images, and all return the same result.

    Args:
        samples: generated images; see `repagen.evaluation.samples` and `PipelineImages`.
        reference: real images of the same size, or statistics made with the same extractors; or what
            `look_at_reference` found in them by the same protocol and extractors.
        protocol: what to measure, and how; see `load_protocol`.
        extractors: space => what turns images into its features; see `open_extractors`.
        name: of the protocol.
        normalisers: space => divisor of its Frechet distance, where the protocol has FDr.
        batch_size: images in hand at once, per process. No figure depends on it.
        max_bad_images: unreadable images allowed on each side; they are left out and listed.
        folder: for features of an evaluation that may be interrupted; the same call continues from it. The caller
            removes it afterwards. By default they are kept in a temporary folder, and lost with the process.
        sink: takes the samples, for example to write them out.
        progress_bar: show how far each side is.

    Raises:
        UserError: on images that cannot be read, differ in size, or give features that are not finite; on statistics
            of another extractor, or a reference that the protocol does not allow; on fewer than two images on a side.
    """
    started = time.monotonic()
    if normalisers is not None and not any("fdr" in space.metrics for space in protocol.spaces):
        raise UserError(f"normalisers are for FDr, which protocol {name} does not measure; leave them out")
    with kept_or_temporary(folder) as place:
        # The reference first: where it fails, no hours of sampling are lost.
        known = reference if isinstance(reference, KnownReference) else look_at_reference(
            reference, protocol, extractors, place / "reference",
            name=name, batch_size=batch_size, max_bad_images=max_bad_images, progress_bar=progress_bar,
        )  # fmt: skip
        real = known.images
        generated = extract(
            samples, extractors, needs_of(protocol, dimensions_of(extractors)), place / "samples",
            batch_size=batch_size, max_bad_images=max_bad_images, sink=sink, title="samples",
            expected_size=known.image_size, progress_bar=progress_bar,
        )  # fmt: skip
    statistics = known.side.statistics
    identities = {space: extractor.identity for space, extractor in extractors.items()}
    figures = _on_main_process(lambda: measure(protocol, Side.of(generated), known.side))
    _add_ratio(protocol, figures, normalisers, identities, known.given)
    return GenerationResult(
        protocol=name,
        settings=dataclasses.asdict(protocol),
        deviations=(*_deviations(protocol, samples, generated), *_reference_deviations(protocol, known.given)),
        metrics=figures.metrics,
        left_out=figures.left_out,
        num_samples=generated.count,
        num_reference=next((one.count for one in statistics.values()), real.count if real else None),
        counts=figures.counts,
        spaces=identities,
        samples=image_facts(samples, generated),
        reference=_reference_facts(known.given, real),
        normalisers={space: dataclasses.asdict(one) for space, one in (normalisers or {}).items()},
        training=samples.training if isinstance(samples, DrawnImages) else {},
        remarks=_remarks(protocol, identities, generated.statistics, statistics),
        versions=software_versions(),
        wall_time_s=round(time.monotonic() - started, 3),
        reference_statistics=dict(statistics),
    )


def dimensions_of(extractors: Mapping[str, FeatureExtractor]) -> dict[str, Mapping[str, int]]:
    """Space => feature => number of features."""
    return {space: extractor.dimensions for space, extractor in extractors.items()}


def open_extractors(protocol: EvaluationProtocol, weights: str | None = None) -> dict[str, FeatureExtractor]:
    """Open the extractor of every space of a protocol, on this process's device.

    Args:
        protocol: names them.
        weights: file with Inception's weights, where not in torch's cache.

    Raises:
        UserError: when something is missing, or `weights` is given and no space is Inception's.
    """
    kinds = [space.extractor.kind for space in protocol.spaces]
    if weights is not None and "inception" not in kinds:
        raise UserError("--extractor-weights are Inception's, and no space of this protocol is; leave them out")
    return {
        space.name: open_extractor(
            space.extractor,
            weights=weights if space.extractor.kind == "inception" else None,
            device=PartialState().device,
        )
        for space in protocol.spaces
    }


def _on_main_process(compute: Callable[[], Figures]) -> Figures:
    """Compute once for all processes: eight at a time would fight for the same cores."""
    state = PartialState()
    found = [compute() if state.is_main_process else None]
    if state.num_processes > 1:
        broadcast_object_list(found)
    assert found[0] is not None, "the main process computes"
    return found[0]


def require_reference(protocol: EvaluationProtocol, name: str, reference: ImageSource | ReferenceStatistics) -> None:
    """Refuse a reference of another kind or size than a protocol's.

    Raises:
        UserError: saying what the protocol compares with.
    """
    is_statistics = isinstance(reference, ReferenceStatistics)
    wanted = protocol.reference.kind
    if wanted != "any" and is_statistics != (wanted == "statistics"):
        given = "statistics" if is_statistics else "images"
        raise UserError(
            f"protocol {name} compares with {wanted} ({protocol.reference.description}), but {given} "
            "are given; give those, or use the protocol torch-fidelity for references of your own"
        )
    carried = reference.images if isinstance(reference, ReferenceStatistics) else None
    if carried is not None and protocol.image_size and carried.shape[1:3] != (protocol.image_size,) * 2:
        raise UserError(
            f"protocol {name} is for {protocol.image_size} px, but the images in the reference are "
            f"{carried.shape[2]}x{carried.shape[1]}; give the reference of this protocol"
        )


def require_statistics(
    protocol: EvaluationProtocol, reference: ReferenceStatistics, extractors: Mapping[str, FeatureExtractor]
) -> None:
    """Refuse statistics that are not those of a protocol's extractors, or no statistics at all.

    Raises:
        UserError: on another extractor, a missing feature, another number of features, or a matrix that is no
            covariance.
    """
    for space in protocol.spaces:
        metrics: list[MetricName] = [metric for metric in ("fd", "sfid") if metric in space.metrics]
        if not metrics:  # it needs single images alone, whose features are taken here
            continue
        extractor = extractors[space.name]
        reference.require_extractor(space.name, extractor.identity)
        for metric in metrics:
            feature = feature_of(metric, space)
            if feature in reference.statistics:
                _require_gaussian(reference, feature, extractor.dimensions[feature.split(".")[1]])
            elif metric == "fd":
                raise UserError(
                    f"the reference {reference.path} holds no statistics of {feature} (it has "
                    f"{', '.join(reference.statistics)}); make one with `repagen reference make`"
                )


def _require_gaussian(reference: ReferenceStatistics, feature: str, needed: int) -> None:
    statistics = reference.statistics[feature]
    if statistics.dimension != needed:
        raise UserError(
            f"{reference.path}: {statistics.dimension} features of {feature}, but the extractor gives {needed}; give "
            "statistics of this extractor"
        )
    with naming({"not a covariance": f"{reference.path}: sigma of {feature} is not a covariance"}):
        _ = statistics.root  # kept, and needed for the distance


def _add_ratio(
    protocol: EvaluationProtocol,
    figures: Figures,
    normalisers: Mapping[str, Normaliser] | None,
    identities: Mapping[str, ExtractorIdentity],
    reference: ImageSource | ReferenceStatistics,
) -> None:
    spaces = [space.name for space in protocol.spaces if "fdr" in space.metrics]
    if not spaces:
        return
    if normalisers is None:
        figures.left_out["fdr"] = "no table of normalisers is given (--normalisers FILE)"
        return
    missing = [space for space in spaces if metric_names("fd", space)[0] not in figures.metrics]
    if missing:
        figures.left_out["fdr"] = f"the Frechet distance of {', '.join(missing)} is missing"
        return
    for space, normaliser in normalisers.items():
        _require_normaliser(space, normaliser, identities, reference)
    distances = {space: figures.metrics[metric_names("fd", space)[0]] for space in spaces}
    divisors = {space: normaliser.frechet_distance for space, normaliser in normalisers.items()}
    figures.metrics["fdr"] = frechet_distance_ratio(distances, divisors)


def _require_normaliser(
    space: str,
    normaliser: Normaliser,
    identities: Mapping[str, ExtractorIdentity],
    reference: ImageSource | ReferenceStatistics,
) -> None:
    identity = identities.get(space)
    if identity and normaliser.extractor and not normaliser.extractor.matches(identity):
        raise UserError(
            f"normaliser of {space}: measured with {normaliser.extractor}, but the extractor is {identity}; give the "
            "table of these extractors"
        )
    given = reference.sha256 if isinstance(reference, ReferenceStatistics) else None
    if normaliser.reference_sha256 and normaliser.reference_sha256 != given:
        raise UserError(
            f"normaliser of {space}: belongs to reference {normaliser.reference_sha256[:12]}, but the reference is "
            f"{given[:12] if given else 'not a file of statistics'}; give the table of this reference"
        )


def _deviations(protocol: EvaluationProtocol, samples: ImageSource, generated: Extraction) -> tuple[str, ...]:
    """What the protocol says and this evaluation does not do, as far as the samples tell it."""
    facts = samples.protocol
    deviations = []
    if protocol.num_samples is not None and generated.count != protocol.num_samples:
        deviations.append(f"{generated.count} samples, the protocol says {protocol.num_samples}")
    if protocol.image_size is not None and generated.image_size != (protocol.image_size,) * 2:
        height, width = generated.image_size
        deviations.append(f"samples are {width}x{height}, the protocol says {protocol.image_size} px")
    for key, wanted in (
        ("label_mode", protocol.label_mode),
        ("rounding", protocol.rounding),
        ("dtype", protocol.sampling_dtype),
    ):
        given = facts.get(key)
        if given is not None and wanted is not None and given != wanted:
            deviations.append(f"{key}={given}, the protocol says {wanted}")
    return tuple(deviations)


def _reference_deviations(
    protocol: EvaluationProtocol, reference: ImageSource | ReferenceStatistics
) -> tuple[str, ...]:
    wanted = protocol.reference.layout
    if wanted is None or (isinstance(reference, ReferenceStatistics) and reference.layout == wanted):
        return ()
    return (f"the reference is not {protocol.reference.description}, which the protocol says",)


def image_facts(source: ImageSource, extraction: Extraction) -> dict[str, Any]:
    """Where images came from, their size, and the hash of their pixels."""
    height, width = extraction.image_size
    left_out = {"left_out": [image.name for image in extraction.unreadable]} if extraction.unreadable else {}
    return {**source.protocol, "size": f"{width}x{height}", "pixels_sha256": extraction.pixels_sha256, **left_out}


def _reference_facts(reference: ImageSource | ReferenceStatistics, real: Extraction | None) -> dict[str, Any]:
    if isinstance(reference, ReferenceStatistics):
        made_from = reference.protocol or "not recorded, taken for Inception's"
        return {"kind": "statistics", "path": str(reference.path), "sha256": reference.sha256, "of": made_from}
    assert real is not None, "a reference of images is looked at"
    return image_facts(reference, real)


def _remarks(
    protocol: EvaluationProtocol,
    identities: Mapping[str, ExtractorIdentity],
    samples: Mapping[str, Statistics],
    reference: Mapping[str, Statistics],
) -> tuple[str, ...]:
    remarks: list[str] = []
    for space in protocol.spaces:
        feature = feature_of("fd", space)
        if feature in samples:
            known = reference[feature].count if feature in reference else None
            counts = {"samples": samples[feature].count, "reference images": known}
            remarks += distance_remarks(counts, samples[feature].dimension, identities[space.name])
    return tuple(dict.fromkeys(remarks))

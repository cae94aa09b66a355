"""What a file of reference statistics holds, in plain words, and whether it serves a protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repagen.errors import naming
from repagen.evaluation.extractor import FeatureExtractor
from repagen.evaluation.generation import require_reference, require_statistics
from repagen.evaluation.inception import INCEPTION, TENSORFLOW_KERNEL
from repagen.evaluation.measures import SINGLE_IMAGES, feature_of
from repagen.evaluation.metrics.frechet import expected_frechet_bias
from repagen.evaluation.moments import Statistics
from repagen.evaluation.protocol import EvaluationProtocol, metric_names
from repagen.evaluation.reference import ReferenceStatistics
from repagen.evaluation.reference_building import STATED
from repagen.evaluation.reporting import aligned, described, distance_remarks

_PUBLISHED_SAMPLES = 50_000
_INCEPTION_DIMENSION = 2048


def describe_reference(reference: ReferenceStatistics) -> str:
    """Return a table of what a file holds: layout, features, extractors, images, what to expect of distances to it.

    Raises:
        UserError: for a matrix that is no covariance.
    """
    rows = [("file", str(reference.path)), ("sha256", reference.sha256), ("layout", reference.layout)]
    for feature, statistics in reference.statistics.items():
        with naming({"not a covariance": f"{reference.path}: sigma of {feature} is not a covariance"}):
            rows.append((feature, _feature(statistics)))
    rows += [(f"extractor of {space}", str(identity)) for space, identity in reference.extractors.items()]
    if not reference.extractors:
        rows.append(("extractor", _unrecorded(reference)))
    rows.append(("made from", _origin(reference.protocol)))
    if reference.images is None:
        carried = "none; metrics of single images (precision, recall, KID ...) are left out"
    else:
        count, height, width, _ = reference.images.shape
        carried = f"{count} of {width}x{height}, for metrics of single images; the statistics are not theirs"
    rows.append(("images in the file", carried))
    if reference.versions:
        rows.append(("versions", described(reference.versions)))
    return aligned(rows + [("note", note) for note in _notes(reference)])


def _feature(statistics: Statistics) -> str:
    dimension, count = statistics.dimension, statistics.count
    rank = len(statistics.root)
    text = f"{dimension} features of {count or 'an unknown number of'} images, rank {rank}"
    if count is not None and count <= dimension:
        return f"{text}: singular, since there are no more images than features"
    bias = expected_frechet_bias(statistics.covariance, num_samples=_PUBLISHED_SAMPLES, num_reference=count)
    return (
        f"{text}; {_PUBLISHED_SAMPLES} samples of the same distribution are to be expected at a distance of {bias:.3g}"
    )


def _unrecorded(reference: ReferenceStatistics) -> str:
    pool = reference.statistics.get("inception.pool")
    if pool is not None and pool.dimension == _INCEPTION_DIMENSION:
        return f"not recorded; taken for {INCEPTION} with the kernel {TENSORFLOW_KERNEL}"
    return "not recorded, and not Inception's; say whose with `repagen reference import`"


def _origin(protocol: Mapping[str, Any]) -> str:
    if "parts" in protocol:
        parts = [described(part) for part in protocol["parts"]]
        return f"{len(parts)} parts: {'; '.join(parts)}"
    if "sources" in protocol:
        sources = [f"{space} from {described(source)}" for space, source in protocol["sources"].items()]
        return f"files of other tools, {protocol['identity']}: {'; '.join(sources)}"
    return described(protocol) or "not recorded"


def _notes(reference: ReferenceStatistics) -> tuple[str, ...]:
    notes: list[str] = []
    for feature, statistics in reference.statistics.items():
        identity = reference.extractors.get(feature.split(".")[0])
        if identity is not None:
            notes += distance_remarks({"reference images": statistics.count}, statistics.dimension, identity)
    if reference.protocol.get("identity") == STATED:
        notes.append(
            "the extractor is stated by the user: ports of one network differ, and figures against this file are as "
            "good as that statement"
        )
    return tuple(dict.fromkeys(notes))


def suits(
    protocol: EvaluationProtocol,
    name: str,
    reference: ReferenceStatistics,
    extractors: Mapping[str, FeatureExtractor],
) -> str:
    """Return which metrics of a protocol a file can serve, by the rules of `evaluate_generation`.

    Raises:
        UserError: when it cannot serve it.
    """
    require_reference(protocol, name, reference)
    require_statistics(protocol, reference, extractors)
    left_out: list[str] = []
    for space in protocol.spaces:
        for metric in space.metrics:
            needs_images = metric in SINGLE_IMAGES and reference.images is None
            if needs_images or (metric == "sfid" and feature_of(metric, space) not in reference.statistics):
                left_out += metric_names(metric, space.name)
    return f"suits {name}" + (f", without {', '.join(left_out)}" if left_out else "")

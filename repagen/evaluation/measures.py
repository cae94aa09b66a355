"""From what a protocol asks for to figures: which features each metric needs, and how it is computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from repagen.errors import UserError, naming
from repagen.evaluation.encoder_extractors import FEATURE
from repagen.evaluation.extraction import Extraction, Needs
from repagen.evaluation.metrics.density_coverage import density_coverage
from repagen.evaluation.metrics.frechet import frechet_distance
from repagen.evaluation.metrics.inception_score import InceptionScoreSums
from repagen.evaluation.metrics.kernel_distance import clip_mmd, kernel_inception_distance
from repagen.evaluation.metrics.mind import monge_inception_distance
from repagen.evaluation.metrics.precision_recall import precision_recall
from repagen.evaluation.moments import Features, Statistics
from repagen.evaluation.protocol import EvaluationProtocol, MetricName, SpaceRule, metric_names

_INCEPTION_FEATURES: dict[MetricName, str] = {"sfid": "spatial", "inception_score": "logits"}
SINGLE_IMAGES: tuple[MetricName, ...] = ("kid", "precision_recall", "density_coverage", "mind", "cmmd")


@dataclass(frozen=True)
class Side:
    """What is known of the samples or of the reference.

    Attributes:
        statistics: feature => mean and covariance.
        features: feature => those of the first images; empty for a reference that is a file of statistics.
        score: sums of the Inception Score.
    """

    statistics: Mapping[str, Statistics]
    features: Mapping[str, Features]
    score: InceptionScoreSums | None = None

    @classmethod
    def of(cls, extraction: Extraction) -> Side:
        """What an extraction knows."""
        return cls(extraction.statistics, extraction.features, extraction.score)

    def gaussian(self, feature: str) -> Features | Statistics:
        """For the Frechet distance: the features themselves where they are few, which is faster and exact."""
        statistics, features = self.statistics[feature], self.features.get(feature)
        few = features is not None and statistics.count == len(features) <= statistics.dimension
        return features if few and features is not None else statistics


def feature_of(metric: MetricName, space: SpaceRule) -> str:
    """The feature that a metric looks at, as `inception.pool`."""
    if space.extractor.kind != "inception":
        return f"{space.name}.{FEATURE}"
    return f"{space.name}.{_INCEPTION_FEATURES.get(metric, 'pool')}"


def needs_of(
    protocol: EvaluationProtocol, dimensions: Mapping[str, Mapping[str, int]], *, reference: bool = False
) -> Needs:
    """What a protocol's metrics need to know of the samples, or of reference images.

    Args:
        protocol: names the metrics.
        dimensions: space => feature, as `pool`, => number of features D.
        reference: of reference images.
    """
    moments: dict[str, None] = {}  # a set that keeps its order
    kept: dict[str, int] = {}
    scored = None
    for space in protocol.spaces:
        for metric in space.metrics:
            feature = feature_of(metric, space)
            if metric in ("fd", "sfid"):
                moments[feature] = None
                kept[feature] = max(kept.get(feature, 0), dimensions[space.name][feature.split(".")[1]])
            elif metric in SINGLE_IMAGES:
                kept[feature] = max(kept.get(feature, 0), _images_kept(protocol, metric, reference))
            elif metric == "inception_score" and not reference:
                rule = protocol.inception_score
                scored = (feature, rule.splits, rule.order)
    return Needs(tuple(moments), kept, scored)


def _images_kept(protocol: EvaluationProtocol, metric: MetricName, reference: bool) -> int:
    if metric not in ("precision_recall", "density_coverage"):
        return protocol.num_kept
    rule = getattr(protocol, metric)
    return rule.num_reference if reference else rule.num_samples


def least_images(protocol: EvaluationProtocol, metric: MetricName) -> int:
    """How many images of a side a metric cannot do without."""
    least = {
        "kid": protocol.kernel.subset_size,
        "precision_recall": protocol.precision_recall.neighbours + 1,
        "density_coverage": protocol.density_coverage.neighbours + 1,
        "inception_score": protocol.inception_score.splits,
    }
    return least.get(metric, 2)


def require_enough_samples(protocol: EvaluationProtocol, count: int) -> None:
    """Refuse a number of samples with which a metric of the protocol cannot be measured.

    Raises:
        UserError: naming the metric.
    """
    for space in protocol.spaces:
        for metric in space.metrics:
            least = least_images(protocol, metric)
            seen = min(count, _images_kept(protocol, metric, False)) if metric in SINGLE_IMAGES else count
            if seen < least:
                raise UserError(f"{metric} needs at least {least} samples, got {seen}; draw more, or leave it out")


def require_enough_reference(protocol: EvaluationProtocol, reference: Side) -> None:
    """Refuse a reference with which a metric of the protocol cannot be measured.

    Raises:
        UserError: naming the metric.
    """
    for space in protocol.spaces:
        for metric in space.metrics:
            with naming({"": f"{metric} cannot be measured: "}):
                _require_of_reference(protocol, metric, feature_of(metric, space), reference)


def _require_of_reference(protocol: EvaluationProtocol, metric: MetricName, feature: str, reference: Side) -> None:
    if metric in ("fd", "sfid"):
        _require_moments(reference, feature)
    elif metric in SINGLE_IMAGES:
        _require_single_images(reference, feature)
        count = min(len(reference.features[feature]), _images_kept(protocol, metric, True))
        if count < least_images(protocol, metric):
            raise UserError(f"it needs at least {least_images(protocol, metric)} reference images, got {count}")


def _require_moments(reference: Side, feature: str) -> None:
    if feature not in reference.statistics:
        raise UserError(f"the reference holds no statistics of {feature}")


def _require_single_images(reference: Side, feature: str) -> None:
    if feature not in reference.features:
        raise UserError("it compares single images, and the reference holds statistics alone")


@dataclass(frozen=True)
class Figures:
    """Metrics, and what could not be measured.

    Attributes:
        metrics: name => value.
        counts: metric => (samples, reference images) behind it, for metrics of single images.
        left_out: metric => why it is missing.
    """

    metrics: dict[str, float]
    counts: dict[str, tuple[int, int]]
    left_out: dict[str, str]


def measure(protocol: EvaluationProtocol, samples: Side, reference: Side) -> Figures:
    """Compute a protocol's metrics, but for FDr, which needs them all.

    A metric for which the images do not suffice is left out and says why; the others are not lost.
    """
    figures = Figures({}, {}, {})
    for space in protocol.spaces:
        for metric in space.metrics:
            if metric == "fdr":
                continue
            names = metric_names(metric, space.name)
            try:
                values = _values(protocol, metric, space, samples, reference)
            except UserError as error:
                figures.left_out[names[0]] = str(error)
                continue
            figures.metrics.update(zip(names, values, strict=True))
            if metric in SINGLE_IMAGES:
                compared = _single_images(protocol, metric, feature_of(metric, space), samples, reference)
                figures.counts[names[0]] = (len(compared[0]), len(compared[1]))
    return figures


def _values(
    protocol: EvaluationProtocol, metric: MetricName, space: SpaceRule, samples: Side, reference: Side
) -> tuple[float, ...]:
    feature = feature_of(metric, space)
    if metric == "inception_score":
        if samples.score is None:
            raise UserError(f"it needs at least {protocol.inception_score.splits} images, one for each split")
        score = samples.score.result()
        return score.mean, score.std
    if metric in ("fd", "sfid"):
        _require_moments(reference, feature)
        return (frechet_distance(samples.gaussian(feature), reference.gaussian(feature)),)
    return _compare(protocol, metric, *_single_images(protocol, metric, feature, samples, reference))


def _single_images(
    protocol: EvaluationProtocol, metric: MetricName, feature: str, samples: Side, reference: Side
) -> tuple[Features, Features]:
    _require_single_images(reference, feature)
    return (
        samples.features[feature][: _images_kept(protocol, metric, reference=False)],
        reference.features[feature][: _images_kept(protocol, metric, reference=True)],
    )


def _compare(
    protocol: EvaluationProtocol, metric: MetricName, generated: Features, real: Features
) -> tuple[float, ...]:
    if metric == "precision_recall":
        near = precision_recall(generated, real, protocol.precision_recall.neighbours)
        return near.precision, near.recall
    if metric == "density_coverage":
        found = density_coverage(generated, real, protocol.density_coverage.neighbours)
        return found.density, found.coverage
    if metric == "kid":
        rule = protocol.kernel
        distance = kernel_inception_distance(generated, real, subsets=rule.subsets, subset_size=rule.subset_size)
        return distance.mean, distance.std
    return (clip_mmd(generated, real) if metric == "cmmd" else monge_inception_distance(generated, real),)

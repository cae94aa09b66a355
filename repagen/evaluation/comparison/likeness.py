"""Results side by side: what must be equal for that, which is better, and how long a model trained to get there.

Figures of different protocols, extractors, references or numbers of images are different quantities. Nothing here puts
them beside each other, and there is no option for it. Not for the number of images N either: a Frechet distance
exceeds its limit by about (1/N) (5/4 tr S + 1/2 sum_ij l_i l_j / (l_i + l_j)), l being the eigenvalues of the
features' covariance S, so the excess depends on the model and cannot be subtracted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from repagen.config import flatten
from repagen.errors import UserError

Axis = Literal["images", "epochs", "steps"]

_LOWER = ("fid", "sfid", "fd", "fdr", "kid", "mind", "cmmd", "rfid", "lpips")
_HIGHER = (
    *("inception_score", "precision", "recall", "density", "coverage"),
    *("psnr", "ssim", "clip_score", "pick_score", "accuracy"),
)

_PROSE = ("title", "source", "explanation", "reference.description")
_MAY_BE_UNKNOWN = "samples."  # of samples that are given as files, nobody knows how they were drawn
# Start of a key => what to do where it differs.
_ADVICE = {
    "kind": "compare results of one kind",
    "space": "evaluate them again with one extractor",
    "reference": "evaluate them again against one reference",
    "num_samples": "a distance grows with 1/N by an amount that depends on the model, so evaluate equal numbers",
    "normalisers": "evaluate them again with one table of normalisers",
    "samples": "sample and evaluate them alike",
    "": "evaluate them again by one protocol (`repagen evaluate show` explains them)",
}


@dataclass(frozen=True, kw_only=True)
class ComparedResult:
    """A result file, perhaps one of those that a training run left.

    Attributes:
        label: name of its row.
        group: the model; results of one group are moments of one training.
        origin: the file, as messages name it.
        kind: `generation`, `reconstruction`, ...
        metrics: name => value; spreads are called `..._std`.
        fixed: what must be equal, by dotted key; what is not known of samples is None.
        shown: what may differ, and is shown.
        training: `images`, `step`, `dataset_images`, as far as known.
        remarks: why its figures must not stand beside those from elsewhere.
    """

    label: str
    group: str
    origin: str
    kind: str
    metrics: Mapping[str, float]
    fixed: Mapping[str, Any]
    shown: Mapping[str, Any]
    training: Mapping[str, int]
    remarks: tuple[str, ...] = ()

    @property
    def epochs(self) -> float | None:
        """Passes over the training data; None where it is not known."""
        images, dataset = self.training.get("images"), self.training.get("dataset_images")
        return None if images is None or not dataset else images / dataset

    def position(self, axis: Axis) -> float:
        """How far training had come.

        Raises:
            UserError: where the result does not say it.
        """
        known = {"images": self.training.get("images"), "steps": self.training.get("step"), "epochs": self.epochs}
        value = known[axis]
        if value is None:
            hint = "; give --dataset-images" if axis == "epochs" and known["images"] is not None else ""
            raise UserError(f"{self.origin} does not say how many {axis} the model was trained for{hint}")
        return float(value)


def protocol_facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol's settings by dotted key, spaces by name, without what is said in words only."""
    spaces = settings.get("spaces")
    if isinstance(spaces, list):
        settings = {**settings, "spaces": {space["name"]: space for space in spaces}}
    return {key: value for key, value in flatten(settings).items() if key and key not in _PROSE}


@dataclass(frozen=True)
class Difference:
    """A fact in which a result is unlike another.

    Attributes:
        key: of the fact.
        first: the earlier result.
        other: the later one.
    """

    key: str
    first: ComparedResult
    other: ComparedResult

    def __str__(self) -> str:
        pair = (self.first, self.other)
        values = [described_value(one.fixed[self.key]) if self.key in one.fixed else "missing" for one in pair]
        if values[0] == values[1]:  # the number 64 is not the text 64
            values = [
                f"{value} ({type(one.fixed.get(self.key)).__name__})" for value, one in zip(values, pair, strict=True)
            ]
        return f"{self.key} is " + ", ".join(
            f"{value} in {one.origin}" for value, one in zip(values, pair, strict=True)
        )


def differences(results: Sequence[ComparedResult]) -> list[Difference]:
    """What keeps results from standing side by side, in the order of importance; empty where nothing does.

    Facts of samples that a result does not know count as alike; see `unknown_facts`.
    """
    found: list[Difference] = []
    for key in dict.fromkeys(key for result in results for key in result.fixed):
        told = [one for one in results if one.fixed.get(key) is not None or not key.startswith(_MAY_BE_UNKNOWN)]
        unlike = [Difference(key, told[0], one) for one in told[1:] if _value(one, key) != _value(told[0], key)]
        # The many moments of a run that differ in one way are one difference.
        found += {(one.other.group, str(_value(one.other, key))): one for one in reversed(unlike)}.values()
    return found


def _value(result: ComparedResult, key: str) -> tuple[bool, Any]:
    return key in result.fixed, result.fixed.get(key)


def unknown_facts(results: Sequence[ComparedResult]) -> Iterator[tuple[str, str]]:
    """Fact of samples => file that does not say it, where another one does."""
    for key in dict.fromkeys(key for result in results for key in result.fixed if key.startswith(_MAY_BE_UNKNOWN)):
        silent = [one.origin for one in results if one.fixed.get(key) is None]
        if len(silent) < len(results):
            yield from dict.fromkeys((key.removeprefix(_MAY_BE_UNKNOWN), origin) for origin in silent)


def require_alike(results: Sequence[ComparedResult]) -> None:
    """Refuse results that are not figures of one quantity.

    Raises:
        UserError: naming the first fact in which they differ, both values, both files, and what to do.
    """
    found = differences(results)
    if found:
        advice = next(advice for start, advice in _ADVICE.items() if found[0].key.startswith(start))
        more = f" (and {len(found) - 1} more: --list-differences)" if len(found) > 1 else ""
        raise UserError(f"not comparable: {found[0]}{more}; {advice}")


def described_value(value: Any) -> str:
    """A fact as words: hashes shortened, lists joined."""
    if value is None:
        return "not given"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(described_value, value)) + "]"
    return str(value)


def lower_is_better(metric: str) -> bool | None:
    """Whether the lower value of a metric is the better one; None where that is not known, and for spreads."""
    if "_std" in metric:
        return None
    for names, lower in ((_LOWER, True), (_HIGHER, False)):
        if any(metric == name or metric.startswith((f"{name}_", f"{name} ")) for name in names):
            return lower
    return None


def metrics_of(results: Sequence[ComparedResult], chosen: Sequence[str] | None = None) -> list[str]:
    """Metrics that any result has, spreads left out; or those that are chosen.

    Raises:
        UserError: when one is chosen that no result has.
    """
    known = [name for name in dict.fromkeys(name for one in results for name in one.metrics) if "_std" not in name]
    missing = [name for name in chosen or () if name not in known]
    if missing:
        raise UserError(f"no result has the metric {missing[0]!r}; they have {', '.join(known)}")
    return list(chosen or known)


def best_rows(results: Sequence[ComparedResult], metric: str) -> set[int]:
    """Numbers of the results that are best in a metric: several where equal, none where all are."""
    lower = lower_is_better(metric)
    values = {number: one.metrics[metric] for number, one in enumerate(results) if metric in one.metrics}
    if lower is None or len(set(values.values())) < 2:
        return set()
    best = min(values.values()) if lower else max(values.values())
    return {number for number, value in values.items() if value == best}


def by_group(results: Sequence[ComparedResult], metric: str, axis: Axis) -> dict[str, list[ComparedResult]]:
    """Group => its results that have the metric, in the order of training.

    Raises:
        UserError: where a result does not say how far training had come, or two of a group had come equally far.
    """
    groups: dict[str, list[ComparedResult]] = {}
    for result in sorted((one for one in results if metric in one.metrics), key=lambda one: one.position(axis)):
        group = groups.setdefault(result.group, [])
        if group and group[-1].position(axis) == result.position(axis):
            raise UserError(
                f"{group[-1].origin} and {result.origin} are both {result.group!r} after {result.position(axis):g} "
                f"{axis}; tell models apart with NAME=FILE"
            )
        group.append(result)
    return {name: groups[name] for name in dict.fromkeys(one.group for one in results) if name in groups}


@dataclass(frozen=True)
class EpochsTo:
    """How long a model trained until a metric was good enough.

    Attributes:
        group: the model.
        reached: its first evaluation that is good enough; None where there is none.
        before: the evaluation before that one; None where it is the first.
        best: its best evaluation.
    """

    group: str
    reached: ComparedResult | None
    before: ComparedResult | None
    best: ComparedResult


def epochs_to(results: Sequence[ComparedResult], metric: str, threshold: float) -> list[EpochsTo]:
    """EP_FID@k (RAEv2, 2605.18324) for any metric: training epochs until the unguided figure is k or better.

    It is the epoch of the first evaluation that is good enough, nothing is interpolated: a model that is evaluated
    seldom cannot look faster than it was. Epochs are training images seen / images in the dataset.

    Args:
        results: of one or several models, each at one or several moments of training.
        metric: of which it is known whether lower or higher is better.
        threshold: k.

    Raises:
        UserError: on guided results, and on results that do not say what guidance or how long a training they had.
    """
    lower = lower_is_better(metrics_of(results, [metric])[0])
    if lower is None:
        raise UserError(f"whether a lower or a higher {metric} is better is not known, so no epoch can reach one")
    _require_unguided(results)
    sign = 1 if lower else -1
    reports = []
    for group, moments in by_group(results, metric, "epochs").items():
        values = [sign * one.metrics[metric] for one in moments]
        first = next((number for number, value in enumerate(values) if value <= sign * threshold), None)
        best = moments[values.index(min(values))]
        reached = None if first is None else moments[first]
        reports.append(EpochsTo(group, reached, moments[first - 1] if first else None, best))
    return reports


def _require_unguided(results: Sequence[ComparedResult]) -> None:
    for result in results:
        scale = result.shown.get("guidance_scale")
        if not isinstance(scale, int | float):
            raise UserError(
                f"{result.origin} does not say with what guidance it was sampled, and epochs to a figure are those of "
                "unguided samples; evaluate with --model and --guidance-scale 1"
            )
        if scale > 1:
            raise UserError(
                f"{result.origin} was sampled with guidance_scale={scale:g}, and epochs to a figure are those of "
                "unguided samples (RAEv2, 2605.18324); evaluate with --guidance-scale 1"
            )

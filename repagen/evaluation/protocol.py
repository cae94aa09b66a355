"""Protocols: everything that moves a figure, fixed under a name, as data.

A protocol is a YAML file: those of the literature lie in `repagen/evaluation/protocols`, a user's own is given by its
path. Figures of different protocols are never comparable, and `repagen compare` refuses to put them side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from repagen.config import load_config, preset_names, require
from repagen.errors import UserError
from repagen.evaluation.extractor import ExtractorRule, Pooling
from repagen.evaluation.metrics.inception_score import Order
from repagen.evaluation.samples import LabelMode, Rounding

PROTOCOLS = "repagen.evaluation.protocols"

MetricName = Literal[
    "fd", "sfid", "inception_score", "kid", "precision_recall", "density_coverage", "mind", "cmmd", "fdr"
]
_INCEPTION_ONLY = ("sfid", "inception_score")


@dataclass
class SpaceRule:
    """A space of features, and what is measured in it.

    Attributes:
        name: of the space; `inception` gives the metrics the names of the literature (`fid`, `kid`), another name is
            appended (`fd_dinov2`).
        extractor: how images become features.
        metrics: `fd` (Frechet distance, FID in Inception's space), `sfid`, `inception_score`, `kid`,
            `precision_recall`, `density_coverage`, `mind`, `cmmd`, `fdr` (counts this space in the mean ratio FDr^k).
    """

    name: str
    extractor: ExtractorRule
    metrics: list[MetricName]

    def validate(self) -> None:
        """Check what the types cannot say."""
        once = bool(self.metrics) and len(set(self.metrics)) == len(self.metrics)
        require(once, "metrics", self.metrics, "at least one metric, each once")
        require(self.name.replace("_", "").isalnum(), "name", self.name, "letters, digits and _")
        literature = self.extractor.kind == "inception"
        allowed = "inception for extractors of that kind, another name for others"
        require((self.name == "inception") == literature, "name", self.name, allowed)
        if self.extractor.kind != "inception":
            require(bool(self.extractor.model), "extractor.model", self.extractor.model, "a folder, Hub id or name")
            wrong = [metric for metric in self.metrics if metric in _INCEPTION_ONLY]
            require(not wrong, "metrics", wrong, f"without {', '.join(_INCEPTION_ONLY)}, which are Inception's")
        if "fdr" in self.metrics:
            require("fd" in self.metrics, "metrics", self.metrics, "with fd, which fdr divides")


@dataclass
class ReferenceRule:
    """What samples are compared with.

    Attributes:
        kind: `statistics` (a file of means and covariances), `images`, or `any`.
        description: which, and where it comes from, in words.
        layout: of the file: `ADM`, where the protocol stands for ADM's own; None = any. Another file is a deviation.
    """

    kind: Literal["statistics", "images", "any"] = "any"
    description: str = ""
    layout: Literal["ADM"] | None = None


@dataclass
class InceptionScoreRule:
    """How the Inception Score splits the samples.

    Attributes:
        splits: the score is their mean.
        order: `file` (consecutive chunks, ADM), `torch-fidelity` (its shuffle) or `seeded` (a permutation of seed 0).
    """

    splits: int = 10
    order: Order = "torch-fidelity"

    def validate(self) -> None:
        """Check the ranges."""
        require(self.splits >= 1, "splits", self.splits, "at least 1")


@dataclass
class NeighbourRule:
    """For metrics of nearest neighbours.

    Attributes:
        neighbours: k.
        num_samples: first so many samples at most; also the cap of the features in memory.
        num_reference: the same for reference images.
    """

    neighbours: int
    num_samples: int = 10_000
    num_reference: int = 10_000

    def validate(self) -> None:
        """Check the ranges."""
        require(self.neighbours >= 1, "neighbours", self.neighbours, "at least 1")
        for key in ("num_samples", "num_reference"):
            require(
                getattr(self, key) > self.neighbours, key, getattr(self, key), f"above neighbours={self.neighbours}"
            )


@dataclass
class KernelRule:
    """For the kernel distance (KID).

    Attributes:
        subsets: the distance is their mean.
        subset_size: images drawn from each side for one subset; fewer images refuse the metric.
    """

    subsets: int = 100
    subset_size: int = 1000

    def validate(self) -> None:
        """Check the ranges."""
        require(self.subsets >= 1, "subsets", self.subsets, "at least 1")
        require(self.subset_size >= 2, "subset_size", self.subset_size, "at least 2")


@dataclass(kw_only=True)
class EvaluationProtocol:
    """Everything that moves a figure.

    Attributes:
        title: what it is, in one line.
        source: paper and code it follows.
        explanation: in plain words: how figures of this protocol came about, and what differs from other protocols.
        image_size: side of the images in pixels; None = any.
        num_samples: generated images behind a figure; None = all that are given.
        label_mode: how classes are chosen; None = either.
        rounding: how a pipeline's images become 8-bit.
        sampling_dtype: of the pipeline; None = either.
        reference: what samples are compared with.
        spaces: feature spaces and their metrics.
        inception_score, precision_recall, density_coverage, kernel: settings of these metrics.
        num_kept: images of each side whose features `kid`, `mind` and `cmmd` hold in memory, at most.
    """

    title: str
    source: str
    explanation: str = ""
    image_size: int | None = None
    num_samples: int | None = None
    label_mode: LabelMode | None = None
    rounding: Rounding = "round"
    sampling_dtype: Literal["float32", "bfloat16", "float16"] | None = "float32"
    reference: ReferenceRule = field(default_factory=ReferenceRule)
    spaces: list[SpaceRule]
    inception_score: InceptionScoreRule = field(default_factory=InceptionScoreRule)
    precision_recall: NeighbourRule = field(default_factory=lambda: NeighbourRule(neighbours=3))
    density_coverage: NeighbourRule = field(default_factory=lambda: NeighbourRule(neighbours=5))
    kernel: KernelRule = field(default_factory=KernelRule)
    num_kept: int = 10_000

    def validate(self) -> None:
        """Check what the types cannot say."""
        names = [space.name for space in self.spaces]
        require(bool(names) and len(set(names)) == len(names), "spaces", names, "one or more, of different names")
        require(self.num_kept >= 2, "num_kept", self.num_kept, "at least 2")
        for key in ("num_samples", "image_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "at least 1")


def protocol_names() -> list[str]:
    """Names of the protocols that come with repagen."""
    return preset_names(PROTOCOLS)


def protocol_name(name_or_path: str | Path) -> str:
    """What results call a protocol: one's own is called by its file."""
    return str(name_or_path) if str(name_or_path) in protocol_names() else Path(name_or_path).stem


def load_protocol(name_or_path: str | Path) -> EvaluationProtocol:
    """Read a protocol by name, or a user's own from a YAML file.

    Raises:
        UserError: for an unknown name, key or value; the message names what exists.
    """
    if str(name_or_path) not in protocol_names() and not Path(name_or_path).is_file():
        raise UserError(
            f"no protocol {str(name_or_path)!r}: it is neither a file nor one of {', '.join(protocol_names())}; see "
            "`repagen evaluate show`"
        )
    return load_config(EvaluationProtocol, name_or_path, presets=PROTOCOLS)


def encoder_protocol(
    model: str, *, pooling: Pooling = "mean", metrics: Sequence[MetricName] = ("fd", "precision_recall")
) -> EvaluationProtocol:
    """A protocol of one's own: metrics in the space of one vision encoder, called `encoder` in results.

    Args:
        model: id or folder.
        pooling: of its tokens.
        metrics: what to measure there.

    Raises:
        UserError: for metrics that are Inception's, or given twice.
    """
    space = SpaceRule("encoder", ExtractorRule("encoder", model, pooling=pooling), list(metrics))
    space.validate()
    return EvaluationProtocol(
        title=f"metrics in the space of {model}",
        source="put together by hand",
        sampling_dtype=None,
        spaces=[space],
    )


def metric_names(metric: MetricName, space: str) -> tuple[str, ...]:
    """Keys under which a metric of a space stands in results."""
    names = {
        "fd": ("fid",) if space == "inception" else (f"fd_{space}",),
        "sfid": ("sfid",),
        "inception_score": ("inception_score", "inception_score_std"),
        "precision_recall": ("precision", "recall"),
        "density_coverage": ("density", "coverage"),
        "kid": ("kid", "kid_std"),
        "fdr": (),
    }.get(metric, (metric,))
    plain = space == "inception" or metric in ("fd", "fdr")
    return names if plain else tuple(f"{name}_{space}" for name in names)

"""The result of an evaluation: its figures, and beside them everything they depend on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from repagen.evaluation.extractor import ExtractorIdentity
from repagen.evaluation.moments import Statistics
from repagen.evaluation.reporting import aligned, described

SCHEMA = 1
"""Of the JSON files; another number is another layout."""

_UNITS = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "kid": "KID",
    "mind": "MIND",
    "cmmd": "CMMD",
    "fdr": "FDr, mean ratio of Frechet distances",
}


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """Figures and protocol of one evaluation of generated images.

    Attributes:
        protocol: name; `custom` where it was put together by hand.
        settings: the protocol, every value spelled out.
        deviations: in what this evaluation is not what the protocol says; empty where it is.
        metrics: name => value. A name ends with the space it was measured in, but for Inception's, the literature's.
        left_out: metrics of the protocol that could not be measured => why.
        num_samples: images behind the samples' statistics.
        num_reference: images behind the reference's statistics; None where a file does not say it.
        counts: metric => (samples, reference images), for metrics that look at single images.
        spaces: what made the features of each space.
        samples: how the samples came about, and the hash of their pixels.
        reference: protocol and hash of the reference.
        normalisers: divisors of FDr by space; empty without it.
        training: of the model, as far as its pipeline says it: images seen and the like; empty otherwise.
        remarks: why distances must not stand beside figures from elsewhere; empty where they may.
        versions: of the packages involved, and the device.
        wall_time_s: seconds this evaluation took; an interrupted one counts from its continuation.
        reference_statistics: feature => statistics, for `save_statistics`.
    """

    protocol: str
    settings: dict[str, Any]
    deviations: tuple[str, ...]
    metrics: dict[str, float]
    left_out: dict[str, str]
    num_samples: int
    num_reference: int | None
    counts: dict[str, tuple[int, int]]
    spaces: dict[str, ExtractorIdentity]
    samples: dict[str, Any]
    reference: dict[str, Any]
    normalisers: dict[str, Any]
    training: dict[str, Any]
    remarks: tuple[str, ...]
    versions: dict[str, str]
    wall_time_s: float
    reference_statistics: dict[str, Statistics] = field(repr=False, compare=False)

    @property
    def comparable(self) -> bool:
        """Whether the figures may stand beside figures made elsewhere by the same protocol."""
        return not self.remarks and not self.deviations

    def as_dict(self) -> dict[str, Any]:
        """Everything but the reference's matrices, ready for JSON."""
        shown = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "reference_statistics"}
        spaces = {space: identity.as_dict() for space, identity in self.spaces.items()}
        return {"schema": SCHEMA, "kind": "generation", **shown, "spaces": spaces, "comparable": self.comparable}

    def table(self) -> str:
        """The result as aligned lines of text."""
        rows = [(_title(name), self._value(name)) for name in self.metrics if not name.endswith("_std")]
        rows += [(_title(name), f"left out: {reason}") for name, reason in self.left_out.items()]
        rows += [
            ("protocol", self.protocol),
            ("N", f"{self.num_samples} samples, {self.num_reference or 'unknown number of'} reference images"),
            *((f"space {space}", str(identity)) for space, identity in self.spaces.items()),
            ("samples", described(self.samples)),
            ("reference", described(self.reference)),
            *([("training", described(self.training))] if self.training else []),
            ("versions", described(self.versions)),
            ("wall time", f"{self.wall_time_s:.1f} s"),
            *(("deviates", deviation) for deviation in self.deviations),
            *(("not comparable", remark) for remark in self.remarks),
        ]
        return aligned(rows)

    def _value(self, name: str) -> str:
        head, _, space = name.partition("_")
        spread = self.metrics.get(f"{head}_std_{space}" if space and head == "kid" else f"{name}_std")
        shown = f"{self.metrics[name]:.6g}" + (f" +- {spread:.2g}" if spread is not None else "")
        if name in self.counts:
            shown += "  ({} samples, {} reference images)".format(*self.counts[name])
        return shown if self.comparable or not name.startswith(("fid", "sfid", "fd")) else f"{shown}  (not comparable)"


def _title(name: str) -> str:
    if name.startswith("fd_"):
        return f"Frechet distance, {name.removeprefix('fd_')}"
    return _UNITS.get(name, name)

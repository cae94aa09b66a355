"""What a sweep of read-outs found, and beside it everything it depends on."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from repagen.evaluation.reporting import aligned, described
from repagen.evaluation.representation.hyperfeatures import HyperfeatureResult
from repagen.evaluation.representation.readouts import PAIRS, PROBES
from repagen.evaluation.representation.sources import FeatureSlice

# Student's t, 95 % two-sided, by number of seeds.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Reading:
    """One read-out of one slice.

    Attributes:
        readout: its name.
        place: the slice; None for a read-out of all slices together.
        values: one a seed.
    """

    readout: str
    place: FeatureSlice | None
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval of the mean (Student's t over the seeds); None for one seed."""
        count = len(self.values)
        return None if count < 2 else T_95[count] * statistics.stdev(self.values) / math.sqrt(count)

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.half_width is None else f" ± {self.half_width:.4f}")

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        where = {"block": None, "timestep": None} if self.place is None else asdict(self.place)
        interval = None if self.half_width is None else [self.mean - self.half_width, self.mean + self.half_width]
        return {
            "readout": self.readout,
            **where,
            "mean": self.mean,
            "interval_95": interval,
            "values": list(self.values),
        }


@dataclass(frozen=True)
class RepresentationResult:
    """Read-outs of every slice, and protocol.

    Attributes:
        subject: generator or encoder: kind, name, hash of the weights, dtype, label given.
        target: the encoder of `cknna` and `cka`; None without.
        data: where the images come from, fingerprints, numbers of images, split.
        readouts: names, in the order asked for.
        slices: that were read.
        last: those of them that are of the network's last block or layer.
        readings: of every read-out and slice.
        mixes: of `hyperfeatures` and `hyperfeatures_pck`, a result a seed: shares of the slices in the mix, and each
            slice alone by the same training.
        seeds: of noise, split and probes.
        settings: of the read-outs.
        versions: of the packages involved, and the device.
        seconds: wall time.
    """

    subject: dict[str, Any]
    target: dict[str, Any] | None
    data: dict[str, Any]
    readouts: tuple[str, ...]
    slices: tuple[FeatureSlice, ...]
    last: tuple[FeatureSlice, ...]
    readings: tuple[Reading, ...]
    mixes: dict[str, list[HyperfeatureResult]]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def reading(self, readout: str, place: FeatureSlice | None) -> Reading:
        """The reading of a slice, or with None of all slices together."""
        return next(item for item in self.readings if (item.readout, item.place) == (readout, place))

    def best(self, readout: str) -> Reading:
        """The reading with the largest mean. Where there are many slices it is biased upwards: it was chosen by it."""
        return max(self._of(readout), key=lambda item: item.mean)

    def best_of_last(self, readout: str) -> Reading | None:
        """As `best`, among the slices of the last block or layer; None where none was read."""
        return max(
            (item for item in self._of(readout) if item.place in self.last), key=lambda item: item.mean, default=None
        )

    def images_of(self, readout: str) -> dict[str, int]:
        """The numbers of images that the values of a read-out rest on: `train` and `test`, or `N`."""
        counts = self.data["images"]
        if readout in PROBES:
            return {"train": counts["train"], "test": counts["test"]}
        if readout == "hyperfeatures_pck":
            return {"train": counts["pairs_train"], "test": counts["pairs_test"]}
        return {"N": counts["pairs" if readout in PAIRS else "measured"]}

    def shown_images(self, readout: str) -> str:
        """`images_of` in words."""
        return ", ".join(f"{name} {count}" for name, count in self.images_of(readout).items())

    def _of(self, readout: str) -> list[Reading]:
        return [item for item in self.readings if item.readout == readout]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        plain = ("subject", "target", "data", "settings", "versions", "seconds")
        return {
            **{name: getattr(self, name) for name in plain},
            "seeds": list(self.seeds),
            "slices": [asdict(place) for place in self.slices],
            "readings": [item.as_dict() for item in self.readings],
            "mixes": {name: [asdict(mix) for mix in mixes] for name, mixes in self.mixes.items()},
            "images": {name: self.images_of(name) for name in self.readouts},
            "best": {name: self.best(name).as_dict() for name in self.readouts},
            "last": {name: last.as_dict() for name in self.readouts if (last := self.best_of_last(name))},
        }

    def table(self) -> str:
        """The result as aligned lines of text: best and last, then every slice, then what it depends on."""
        per_slice = [name for name in self.readouts if self.reading_is_per_slice(name)]
        parts = [aligned([("read-out", "images", "best slice", "last block or layer"), *self._summary()])]
        if per_slice:
            rows = [(str(place), *(str(self.reading(name, place)) for name in per_slice)) for place in self.slices]
            parts.append(aligned([("slice", *per_slice), *rows]))
        parts.append(aligned(self._facts()))
        return "\n\n".join(parts)

    def reading_is_per_slice(self, readout: str) -> bool:
        """Whether a read-out has a value for every slice, in place of one for all."""
        return all(item.place is not None for item in self._of(readout))

    def _summary(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for name in self.readouts:
            best, last = self.best(name), self.best_of_last(name)
            whole = best.place is None
            shown = "-" if last is None else f"{last}  ({last.place})"
            rows.append((name, self.shown_images(name), f"{best}  ({'all slices' if whole else best.place})", shown))
        return rows

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("model", described(_known(self.subject)))]
        if self.target is not None:
            facts.append(("target", described(_known(self.target))))
        facts += [
            (name, described(value) if isinstance(value, dict) else str(value)) for name, value in self.data.items()
        ]
        spread = "mean ± half of the 95 % interval over seeds" if len(self.seeds) > 1 else "one seed, no interval"
        for name, mixes in self.mixes.items():
            gain = Reading(name, None, tuple(mix.gain for mix in mixes))
            alone = Reading(name, None, tuple(max(mix.slice_accuracies) for mix in mixes))
            facts.append((name, f"best slice by the same training {alone}; the mix gains {gain}"))
        facts += [
            ("seeds", f"{', '.join(map(str, self.seeds))} ({spread})"),
            ("settings", described(self.settings)),
            ("versions", described(self.versions)),
            ("wall time", f"{self.seconds:.1f} s"),
            ("best slice", "was chosen by the value shown, which favours it the more, the more slices there are"),
        ]
        return facts


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}

"""FDr^k (2604.28190): Frechet distances in several feature spaces, each in units of that of held-out real images."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repagen.errors import UserError, refusing
from repagen.evaluation.extractor import ExtractorIdentity


@dataclass(frozen=True)
class Normaliser:
    """The unit of one feature space.

    Attributes:
        frechet_distance: of held-out real images to the reference, above 0.
        extractor: what it was measured with; None where the table does not say it.
        reference_sha256: of the statistics it was measured against; None where the table does not say it.
        source: where the table's figures come from.
    """

    frechet_distance: float
    extractor: ExtractorIdentity | None = None
    reference_sha256: str | None = None
    source: str | None = None


def frechet_distance_ratio(distances: Mapping[str, float], normalisers: Mapping[str, float]) -> float:
    """Return the arithmetic mean over feature spaces of distance / normaliser; 1 is as near as held-out real images.

    Args:
        distances: feature space => Frechet distance of the samples to the reference.
        normalisers: feature space => Frechet distance of held-out real images to the same reference.

    Raises:
        UserError: naming a space that only one of them has, a normaliser that is not above 0, or a figure that is not
            finite; or when there is no space.
    """
    if not distances:
        raise UserError("a ratio of Frechet distances needs at least one feature space, got none; add an extractor")
    for names, gap, step in (
        (distances.keys() - normalisers.keys(), "has no normaliser", "add one to the table"),
        (normalisers.keys() - distances.keys(), "has a normaliser but no distance", "evaluate it or remove it"),
    ):
        if names:
            raise UserError(f"feature space {', '.join(sorted(names))} {gap}; {step}")
    for space, value in normalisers.items():
        _require_positive(f"normaliser of {space}", value)
    for space, value in distances.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(
                f"Frechet distance of {space}: expected a finite number of at least 0, got {value}; redo it"
            )
    return sum(distances[space] / normalisers[space] for space in distances) / len(distances)


def load_normalisers(path: str | Path) -> dict[str, Normaliser]:
    """Read a table of normalisers: feature space => normaliser.

    The file is JSON: `{"spaces": {"dinov2": {"frechet_distance": 14.19, "extractor": {"name": ..., "weights_sha256":
    ..., "settings": ...}, "reference_sha256": ...}}, "source": "where these figures come from"}`; `extractor` and
    `reference_sha256` may be left out.

    Raises:
        UserError: when the file is missing or no JSON, or holds an unknown key, lacks one, or holds a value of a wrong
            type or range; the key is named.
    """
    path = Path(path)
    with refusing(f"{path}: cannot be read as a JSON table of normalisers"):
        content = json.loads(path.read_text(encoding="utf-8"))
    table = _mapping(f"{path}", content, required=("spaces", "source"))
    source = _text(f"{path}:source", table["source"])
    spaces = table["spaces"]
    if not isinstance(spaces, dict) or not spaces:
        raise UserError(f"{path}:spaces: expected an object of at least one feature space, got {spaces!r}")
    return {space: _normaliser(f"{path}:spaces.{space}", value, source) for space, value in spaces.items()}


def _normaliser(where: str, value: Any, source: str) -> Normaliser:
    row = _mapping(where, value, required=("frechet_distance",), optional=("extractor", "reference_sha256"))
    extractor, digest = row.get("extractor"), row.get("reference_sha256")
    return Normaliser(
        frechet_distance=_require_positive(f"{where}.frechet_distance", row["frechet_distance"]),
        extractor=None if extractor is None else _identity(f"{where}.extractor", extractor),
        reference_sha256=None if digest is None else _text(f"{where}.reference_sha256", digest),
        source=source,
    )


def _identity(where: str, value: Any) -> ExtractorIdentity:
    names = tuple(field.name for field in dataclasses.fields(ExtractorIdentity))
    row = _mapping(where, value, required=names)
    return ExtractorIdentity(**{name: _text(f"{where}.{name}", row[name]) for name in names})


def _mapping(where: str, value: Any, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    known = (*required, *optional)
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with the keys {', '.join(known)}, got {value!r}")
    if unknown := sorted(value.keys() - set(known)):
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
    if missing := [key for key in required if key not in value]:
        raise UserError(f"{where}: the key {missing[0]!r} is missing; known keys: {', '.join(known)}")
    return value


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: expected a text that is not empty, got {value!r}")
    return value


def _require_positive(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise UserError(
            f"{where}: expected a finite number above 0, got {value!r}; measure it on held-out real images"
        )
    return float(value)

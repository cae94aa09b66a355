from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from repagen.errors import UserError
from repagen.evaluation import ExtractorIdentity
from repagen.evaluation.metrics.ratios import Normaliser, frechet_distance_ratio, load_normalisers

IDENTITY = {"name": "dinov2-large", "weights_sha256": "ab" * 32, "settings": "pooling=cls, size=224"}


def table(**changes: Any) -> dict[str, Any]:
    space = {"frechet_distance": 14.19, "extractor": IDENTITY, "reference_sha256": "cd" * 32}
    return {
        "spaces": {"dinov2": {**space, **changes}, "mae": {"frechet_distance": 1}},
        "source": "2604.28190, Table 1",
    }


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "normalisers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_it_is_the_arithmetic_mean_over_spaces() -> None:
    assert frechet_distance_ratio({"a": 3.0, "b": 10.0}, {"b": 5.0, "a": 1.0}) == pytest.approx(2.5)
    assert frechet_distance_ratio({"a": 0.0}, {"a": 0.04}) == 0


def test_held_out_images_have_the_ratio_one() -> None:
    units = {"inception": 1.68, "convnext": 56.87, "dinov2": 14.19, "mae": 0.04, "siglip": 0.6, "clip": 5.6}
    assert frechet_distance_ratio(units, units) == 1


@pytest.mark.parametrize(
    ("distances", "normalisers", "message"),
    [
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, "feature space b has no normaliser"),
        ({"a": 1.0}, {"a": 1.0, "c": 1.0, "b": 1.0}, "feature space b, c has a normaliser but no distance"),
        ({"a": 1.0}, {"a": 0.0}, "normaliser of a: expected a finite number above 0, got 0.0"),
        ({"a": 1.0}, {"a": -1.0}, "normaliser of a: .*got -1.0"),
        ({"a": 1.0}, {"a": float("nan")}, "normaliser of a: .*got nan"),
        ({"a": 1.0}, {"a": float("inf")}, "normaliser of a: .*got inf"),
        ({"a": float("nan")}, {"a": 1.0}, "distance of a: .*got nan"),
        ({"a": -1.0}, {"a": 1.0}, "distance of a: .*got -1.0"),
        ({}, {}, "at least one feature space"),
    ],
)
def test_wrong_figures_are_named(distances: dict[str, float], normalisers: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        frechet_distance_ratio(distances, normalisers)


def test_a_table_is_read_with_what_it_was_measured_with(tmp_path: Path) -> None:
    found = load_normalisers(write(tmp_path, table()))
    source = "2604.28190, Table 1"
    assert found == {
        "dinov2": Normaliser(14.19, ExtractorIdentity(**IDENTITY), "cd" * 32, source),
        "mae": Normaliser(1.0, None, None, source),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "normalisers.json: cannot be read as a JSON table"),
        ([1], r"normalisers.json: expected an object with the keys spaces, source, got \[1\]"),
        ({"spaces": {}}, "the key 'source' is missing"),
        ({"source": "x"}, "the key 'spaces' is missing"),
        ({"spaces": {}, "source": "x"}, "json:spaces: expected an object of at least one feature space"),
        ({"spaces": [1], "source": "x"}, "json:spaces: expected an object"),
        ({**table(), "source": 3}, "json:source: expected a text that is not empty, got 3"),
        ({**table(), "space": {}}, "unknown key 'space'; known keys: spaces, source"),
        ({"spaces": {"a": 3}, "source": "x"}, r"json:spaces\.a: expected an object with the keys frechet_distance"),
        ({"spaces": {"a": {}}, "source": "x"}, r"spaces\.a: the key 'frechet_distance' is missing"),
        (table(fd=1), r"spaces\.dinov2: unknown key 'fd'"),
        (
            table(frechet_distance="14"),
            r"spaces\.dinov2\.frechet_distance: expected a finite number above 0, got '14'",
        ),
        (table(frechet_distance=True), r"spaces\.dinov2\.frechet_distance: .*got True"),
        (table(frechet_distance=0), r"spaces\.dinov2\.frechet_distance: .*got 0"),
        (table(frechet_distance=float("nan")), r"spaces\.dinov2\.frechet_distance: .*got nan"),
        (table(extractor="dinov2"), r"spaces\.dinov2\.extractor: expected an object"),
        (table(extractor={"name": "x"}), r"spaces\.dinov2\.extractor: the key 'weights_sha256' is missing"),
        (table(extractor={**IDENTITY, "settings": 1}), r"spaces\.dinov2\.extractor\.settings: expected a text"),
        (table(reference_sha256=3), r"spaces\.dinov2\.reference_sha256: expected a text that is not empty, got 3"),
    ],
)
def test_a_wrong_table_is_refused_by_key(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_normalisers(write(tmp_path, content))


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read"):
        load_normalisers(tmp_path / "nowhere.json")

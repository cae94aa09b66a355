"""What the pictures show: values where they belong, axes named, model, number of images and seeds in the title."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from repagen.evaluation.representation.heatmap import save_heat_maps
from repagen.evaluation.representation.result import Reading, RepresentationResult
from repagen.evaluation.representation.sources import FeatureSlice


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were closed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    seen: list[Any] = []
    monkeypatch.setattr(pyplot, "close", seen.append)
    return seen


def result_of(slices: list[FeatureSlice], values: list[tuple[float, ...]]) -> RepresentationResult:
    return RepresentationResult(
        subject={"kind": "generator", "name": "runs/one/pipeline", "weights": "0" * 64},
        target=None,
        data={"images": {"train": 40, "test": 10, "measured": 50}},
        readouts=("linear",),
        slices=tuple(slices),
        last=(slices[-1],),
        readings=tuple(Reading("linear", place, value) for place, value in zip(slices, values, strict=True)),
        mixes={},
        seeds=tuple(range(len(values[0]))),
        settings={},
        versions={},
        seconds=1.0,
    )


def test_a_generators_blocks_against_times(figures: list[Any], tmp_path: Path) -> None:
    slices = [FeatureSlice(block, t) for t in (0.1, 0.9) for block in (1, 2, 4)]
    result = result_of(slices, [(0.1 * number, 0.1 * number + 0.02) for number in range(6)])
    assert save_heat_maps(result, tmp_path) == [tmp_path / "linear.png"]
    axis = figures[0].axes[0]
    shown = axis.images[0].get_array()  # a row a block, a column a time
    assert shown.tolist() == [pytest.approx(row) for row in [[0.01, 0.31], [0.11, 0.41], [0.21, 0.51]]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "4"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "0.9"]
    texts = {text.xy: text.get_text() for text in axis.texts}
    assert texts[1, 2] == "0.510\n±0.127" and len(texts) == 6
    assert axis.get_ylabel() == "block" and "1 = noise" in axis.get_xlabel()
    title = axis.get_title()
    assert all(part in title for part in ("linear probe", "runs/one/pipeline", "train 40, test 10", "seeds 0, 1"))


def test_an_encoders_layers_are_bars(figures: list[Any], tmp_path: Path) -> None:
    save_heat_maps(result_of([FeatureSlice(0), FeatureSlice(11)], [(0.25,), (0.5,)]), tmp_path)
    axis = figures[0].axes[0]
    assert [bar.get_height() for bar in axis.patches] == [0.25, 0.5]
    assert axis.get_xlabel() == "layer" and "seed 0" in axis.get_title()

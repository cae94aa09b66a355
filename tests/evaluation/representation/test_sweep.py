"""A sweep gives what its read-outs give on the right images, over seeds, and says what they were."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import StandardScaler

from repagen.data import DataConfig, ImageDataset, digits_encoder_path, open_image_dataset
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation.extraction import pixel_digest, pixels_sha256
from repagen.evaluation.representation import request
from repagen.evaluation.representation.harvest import harvest_encoder, harvest_generator
from repagen.evaluation.representation.readouts import ReadOutSettings, known_warps, unmoved_pck
from repagen.evaluation.representation.request import split_rows
from repagen.evaluation.representation.result import T_95, Reading
from repagen.evaluation.representation.similarity import cknna, unbiased_cka
from repagen.evaluation.representation.sources import FeatureSlice
from repagen.evaluation.representation.spatial import spatial_structure
from repagen.evaluation.representation.sweep import evaluate_representation
from repagen.evaluation.samples import DatasetImages

FEW_PAIRS = ReadOutSettings(pck_images=4, correspondence_epochs=1, linear_epochs=20)


@pytest.fixture(scope="module")
def train() -> ImageDataset:
    return open_image_dataset(DataConfig(kind="digits", image_size=16, subset="train"))


def test_an_encoder_knows_itself(encoder: VisionEncoder, digits: ImageDataset) -> None:
    result = evaluate_representation(encoder, digits, readouts=["cknna", "cka"], target=encoder)
    for readout in ("cknna", "cka"):
        assert result.reading(readout, FeatureSlice(1)).mean == pytest.approx(1, abs=1e-9)
        assert result.reading(readout, FeatureSlice(0)).mean < 0.9999
        assert result.best(readout).place == FeatureSlice(1) == result.last[0]
    assert result.data["images"] == {"measured": 355}


def test_a_linear_probe_is_trained_on_data_and_tested_on_test_data(
    make_pipeline: Callable[..., Any], train: ImageDataset, digits: ImageDataset
) -> None:
    pipeline, place = make_pipeline(), FeatureSlice(2, 0.1)
    options: dict[str, Any] = {"blocks": [2], "timesteps": [0.1]}
    result = evaluate_representation(pipeline, train, test_data=digits, readouts=["linear"], **options)
    sides = [harvest_generator(pipeline, dataset, **options) for dataset in (train, digits)]
    scaler = StandardScaler().fit(sides[0].pooled(place).double())
    (x, y), (test_x, test_y) = ((scaler.transform(side.pooled(place).double()), side.labels) for side in sides)
    judge = LogisticRegression(C=1 / (1e-3 * len(x)), max_iter=2000).fit(x, y)
    expected = accuracy_score(test_y, judge.predict(test_x))
    assert result.reading("linear", place).mean == pytest.approx(expected, abs=0.01)
    assert 0.2 < expected < 0.9
    assert result.data["images"] == {"train": 1442, "test": 355, "measured": 355}


def test_what_trains_nothing_looks_at_all_images_of_the_test_data(
    make_pipeline: Callable[..., Any], encoder: VisionEncoder, train: ImageDataset, digits: ImageDataset
) -> None:
    pipeline, place = make_pipeline(), FeatureSlice(1, 0.5)
    options: dict[str, Any] = {"blocks": [1], "timesteps": [0.5]}
    readouts: Any = ["cknna", "cka", "lds", "cds", "rmsc"]
    result = evaluate_representation(
        pipeline, train, test_data=digits, readouts=readouts, target=encoder, num_images=300, seeds=[5], **options
    )
    assert result.data["images"]["measured"] == 300
    chosen = torch.randperm(355, generator=_generator(5, "representation images"))[:300].sort().values.tolist()
    tokens = harvest_generator(pipeline, digits, seed=5, indices=chosen, **options).tokens(place)
    target = harvest_encoder(encoder, digits, layers=[-1], indices=chosen).pooled(FeatureSlice(1))
    structure = spatial_structure(tokens, (4, 4))
    expected = {
        "cknna": cknna(tokens.mean(1), target, 10),
        "cka": unbiased_cka(tokens.mean(1), target),
        "lds": structure.lds,
        "cds": structure.cds,
        "rmsc": structure.rmsc,
    }
    assert {name: result.reading(name, place).mean for name in readouts} == pytest.approx(expected, rel=1e-6)


def _generator(seed: int, purpose: str) -> torch.Generator:
    from repagen.randomness import generator_for

    return generator_for(seed, purpose)


def test_equal_images_correspond() -> None:
    encoder = VisionEncoder.from_pretrained(digits_encoder_path())
    images = open_image_dataset(DataConfig(kind="digits", image_size=32, subset="validation"))
    settings = ReadOutSettings(pck_images=6)
    result = evaluate_representation(encoder, images, readouts=["pck", "pck_identity"], settings=settings)
    assert all(result.reading("pck_identity", place).mean > 0.95 for place in result.slices)
    assert result.best("pck").mean < 0.5
    assert result.data["images"]["pairs"] == 6


def test_noise_moves_matches(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    """Image and warped image have noise of their own, so that it cannot tell where a point was."""
    options: dict[str, Any] = {"readouts": ["pck_identity"], "blocks": [1], "num_images": 10}
    result = evaluate_representation(make_pipeline(), digits, timesteps=[0.0, 0.95], **options)
    clean, noisy = (result.reading("pck_identity", FeatureSlice(1, t)).mean for t in (0.0, 0.95))
    assert clean > 0.6 and noisy < 0.2


def test_pck_of_unmoved_points_is_counted() -> None:
    """Point by point, with each warp written out."""
    side, alpha = 32, 0.1
    centres = [(i + 0.5) * side / 8 - 0.5 for i in range(8)]
    middle, (cosine, sine) = (side - 1) / 2, (math.cos(math.pi / 6), math.sin(math.pi / 6))
    maps: list[Callable[[float, float], tuple[float, float]]] = [
        lambda x, y: (x + 8, y + 4),
        lambda x, y: (
            middle + cosine * (x - middle) - sine * (y - middle),
            middle + sine * (x - middle) + cosine * (y - middle),
        ),
        lambda x, y: (side - 1 - x, y),
    ]
    shares = []
    for go in maps:
        moves = [(go(x, y), (x, y)) for x in centres for y in centres]
        kept = [math.dist(to, point) for to, point in moves if all(-0.5 <= place <= side - 0.5 for place in to)]
        shares.append(np.mean([distance <= alpha * side for distance in kept]))
    assert unmoved_pck(side, alpha) == pytest.approx(np.mean(shares))
    assert len(known_warps(side)) == 4


@pytest.mark.parametrize("seed", [0, 1])
def test_the_split_takes_a_fifth_of_each_class(seed: int) -> None:
    labels = torch.tensor([0] * 10 + [1] * 25 + [7] * 3 + [8] * 2 + [9])  # at least one of two
    train, test = split_rows(labels, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(41))
    assert labels[test].bincount().tolist() == [2, 5, 0, 0, 0, 0, 0, 1, 1]
    assert not torch.equal(test, split_rows(labels, seed + 1)[1])
    assert torch.equal(test, split_rows(labels, seed)[1])


def test_seeds_give_values_and_an_interval(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    options: dict[str, Any] = {"readouts": ["knn", "lds"], "blocks": [1], "timesteps": [0.3]}
    pipeline, place = make_pipeline(), FeatureSlice(1, 0.3)
    chosen = [0, 3, 4]
    together = evaluate_representation(pipeline, digits, seeds=chosen, **options)
    alone = [evaluate_representation(pipeline, digits, seeds=[seed], **options) for seed in chosen]
    for readout in ("knn", "lds"):
        reading = together.reading(readout, place)
        assert list(reading.values) == [result.reading(readout, place).values[0] for result in alone]
        assert len(set(reading.values)) > 1
    assert alone[0].reading("lds", place).half_width is None


def test_the_interval_is_students() -> None:
    for count, quantile in T_95.items():
        assert quantile == pytest.approx(stats.t.ppf(0.975, count - 1), abs=6e-4)
    values = (0.3, 0.5, 0.7, 0.9)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    reading = Reading("linear", None, values)
    assert reading.as_dict()["interval_95"] == pytest.approx([low, high], rel=1e-3)


def test_mixes_hold_a_share_for_each_slice(make_pipeline: Callable[..., Any], digits: ImageDataset) -> None:
    result = evaluate_representation(
        make_pipeline(),
        digits,
        readouts=["linear", "hyperfeatures", "hyperfeatures_pck"],
        blocks=[1, 3],
        timesteps=[0.1, 0.5],
        num_images=120,
        settings=FEW_PAIRS,
    )
    for name, mixes in result.mixes.items():
        (mix,) = mixes
        assert len(mix.weights) == len(mix.slice_accuracies) == len(result.slices) == 4
        assert sum(mix.weights) == pytest.approx(1)
        assert result.reading(name, None).values == (mix.accuracy,)
    alone = result.mixes["hyperfeatures"][0].slice_accuracies
    assert list(alone) == [result.reading("linear", place).mean for place in result.slices]
    assert result.best_of_last("hyperfeatures") is None
    last = result.best_of_last("linear")
    assert last is not None and last.place is not None and last.place.block == 3
    assert "the mix gains" in result.table()


def test_the_result_says_what_it_depends_on(
    make_pipeline: Callable[..., Any], digits: ImageDataset, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"readouts": ["rmsc"], "blocks": [1, 2], "timesteps": [0.5], "cache": tmp_path}
    results = [evaluate_representation(make_pipeline(), digits, **options) for _ in range(2)]
    facts = json.loads(json.dumps(results[0].as_dict()))
    assert facts["subject"]["label"] == "null" and len(facts["subject"]["weights"]) == 64
    assert facts["data"]["data"]["fingerprint"] == digits.fingerprint()
    assert facts["seeds"] == [0] and facts["versions"]["torch"] and facts["seconds"] > 0
    assert facts["slices"] == [{"block": 1, "timestep": 0.5}, {"block": 2, "timestep": 0.5}]
    assert facts["last"] == {}  # block 3 was not read
    assert facts["readings"] == results[1].as_dict()["readings"]  # from the cache
    lines = results[0].table().splitlines()
    assert lines[1].split()[0] == "rmsc" and lines[1].endswith("-")
    assert any(line.startswith("block 2, t=0.5") for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readouts": ["linear", "fid"]}, "^readouts: fid: give different ones of linear"),
        ({"readouts": []}, "^readouts: none"),
        ({"readouts": ["cka"]}, "^readouts: cka compares with an encoder; give it as target"),
        ({"target": True}, "^target: cknna and cka alone compare with it"),
        ({"seeds": []}, "^seeds: give 1 to 10"),
        ({"seeds": range(11)}, "^seeds: give 1 to 10"),
        ({"num_images": 400}, "^num_images: 400 given, the dataset has 355"),
        ({"num_images": 7}, "^num_images: 7 are too few; give at least 8"),
        ({"test_data": "flat"}, "^test_data: the images have no labels, which the read-out linear needs"),
        ({"test_data": "few"}, "^test_data: 4 images are too few"),
        ({"test_data": "other"}, "^test_data: its classes are not those"),
        ({"num_images": 40, "readouts": ["knn"], "settings": ReadOutSettings(knn_neighbours=39)},
         "^settings.knn_neighbours: must be from 1 to the 3[0-3] training images, got 39"),
        ({"num_images": 12}, "^settings.knn_neighbours: must be from 1 to the [0-9]+ training images, got 20"),
        ({"num_images": 40, "readouts": ["cknna"], "target": True, "settings": ReadOutSettings(cknna_neighbours=40)},
         "^settings.cknna_neighbours: must be from 1 to 39 with 40 images, got 40"),
        ({"readouts": ["pck"], "num_images": 9, "settings": ReadOutSettings(pck_images=10)},
         "^settings.pck_images: must be from 1 to the 9 images, got 10"),
        ({"readouts": ["hyperfeatures_pck"], "settings": ReadOutSettings(pck_images=1)},
         "^settings.pck_images: must be from 2 to the 355 images, got 1; hyperfeatures_pck learns from one half"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    options: dict[str, Any],
    message: str,
    make_pipeline: Callable[..., Any],
    encoder: VisionEncoder,
    digits: ImageDataset,
    random_pictures: Any,
    write_pictures: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind = options.get("test_data")
    if kind:
        for name in ["."] if kind == "flat" else ["a", "b"]:
            write_pictures(tmp_path / name, random_pictures({"flat": 9, "few": 2, "other": 5}[kind], seed=0))
        config = DataConfig(path=str(tmp_path), image_size=16)
        options = {**options, "test_data": open_image_dataset(config)}
    if options.get("target"):
        options = {**options, "target": encoder}
    pipeline = make_pipeline()
    monkeypatch.setattr(request.Request, "harvest", lambda *arguments: pytest.fail("features were computed"))
    with pytest.raises(UserError, match=message):
        evaluate_representation(pipeline, digits, **options)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([1] * 9, "^data: no class of the 9 images has 2, one of them to test on; give more images"),
        ([9], "^data: the training images are all of one class"),
    ],
)
def test_classes_that_no_probe_can_learn_are_refused(
    levels: list[int], message: str, encoder: VisionEncoder, random_pictures: Any, write_pictures: Any, tmp_path: Path
) -> None:
    for number, count in enumerate(levels):
        write_pictures(tmp_path / str(number), random_pictures(count, seed=number))
    data = open_image_dataset(DataConfig(path=str(tmp_path), image_size=16))
    with pytest.raises(UserError, match=message):
        evaluate_representation(encoder, data, readouts=["linear"])


def test_a_class_that_the_training_images_lack_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data: the training images have none of the test images' class 3"):
        ReadOutSettings().require_enough(["linear"], 4, (torch.tensor([0, 1]), torch.tensor([0, 3])))


def test_the_mix_that_matches_says_what_it_rests_on(encoder: VisionEncoder, digits: ImageDataset) -> None:
    settings = ReadOutSettings(pck_images=7, correspondence_epochs=1)
    result = evaluate_representation(
        encoder, digits, readouts=["pck", "hyperfeatures_pck"], num_images=20, settings=settings
    )
    assert result.as_dict()["images"] == {"pck": {"N": 7}, "hyperfeatures_pck": {"train": 3, "test": 4}}
    lines = result.table().splitlines()
    assert "N 7" in lines[1] and "train 3, test 4" in lines[2]


def test_the_result_holds_a_hash_of_the_pixels(
    encoder: VisionEncoder, digits: ImageDataset, random_pictures: Any, write_pictures: Any, tmp_path: Path
) -> None:
    """The one that an evaluation of generation gives for the same images, wherever they lie."""
    for name in ("one", "copy"):
        for number in range(2):
            write_pictures(tmp_path / name / str(number), random_pictures(6, seed=number))
    found = []
    for name in ("one", "copy"):
        data = open_image_dataset(DataConfig(path=str(tmp_path / name), image_size=16))
        result = evaluate_representation(encoder, data, readouts=["rmsc"])
        found.append(result.data["data"]["pixels_sha256"])
    whole = pixels_sha256([pixel_digest(image) for image in DatasetImages(data).load(range(len(data)))])  # type: ignore[arg-type]
    assert found == [whole, whole]


def test_timesteps_are_not_for_encoders(encoder: VisionEncoder, digits: ImageDataset) -> None:
    with pytest.raises(UserError, match=r"^timesteps: they are for generators"):
        evaluate_representation(encoder, digits, timesteps=[0.5])

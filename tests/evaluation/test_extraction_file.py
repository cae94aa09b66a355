"""What a reference leaves on disk, and which references a protocol can measure against."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import repagen.evaluation.extraction_file as module
from repagen.errors import UserError
from repagen.evaluation import EncoderExtractor, TensorImages
from repagen.evaluation.extraction import Needs, extract
from repagen.evaluation.extraction_file import extract_once, load_extraction, save_extraction
from repagen.evaluation.generation import KnownReference, evaluate_generation, look_at_reference
from repagen.evaluation.measures import Side, least_images, measure, require_enough_reference, require_enough_samples
from repagen.evaluation.metrics.inception_score import split_of_position
from repagen.evaluation.moments import FeatureMoments
from repagen.evaluation.protocol import EvaluationProtocol, KernelRule, MetricName, encoder_protocol, load_protocol

NEEDS = Needs(("encoder.features",), {"encoder.features": 20})


def images(seed: int, count: int = 40) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    return TensorImages(torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8))


def test_written_and_read_it_is_the_same(extractor: EncoderExtractor, tmp_path: Path) -> None:
    found = extract(images(0), {"encoder": extractor}, NEEDS, tmp_path / "features")
    save_extraction(tmp_path / "kept.safetensors", found)
    read = load_extraction(tmp_path / "kept.safetensors")
    for name in ("count", "pixels_sha256", "image_size", "unreadable", "score"):
        assert getattr(read, name) == getattr(found, name)
    old, new = (one.statistics["encoder.features"] for one in (found, read))
    assert torch.equal(old.mean, new.mean) and torch.equal(old.covariance, new.covariance) and old.count == new.count
    assert torch.equal(found.features["encoder.features"], read.features["encoder.features"])
    assert len(read.features["encoder.features"]) == 20


def test_the_same_images_are_looked_at_once(
    extractor: EncoderExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def counted(source: Any, *arguments: Any, **options: Any) -> Any:
        looked.append(len(source))
        return extract(source, *arguments, **options)

    monkeypatch.setattr(module, "extract", counted)
    for source, needs in [(0, NEEDS), (0, NEEDS), (1, NEEDS), (0, Needs(NEEDS.moments)), (1, NEEDS)]:
        extract_once(images(source), {"encoder": extractor}, needs, tmp_path)
    extract_once(images(0), {"encoder": EncoderExtractor(extractor.encoder, "cls")}, NEEDS, tmp_path)
    assert looked == [40, 40, 40, 40]
    assert not list(tmp_path.glob("*.partial"))


def test_a_damaged_file_is_named(extractor: EncoderExtractor, tmp_path: Path) -> None:
    extract_once(images(0), {"encoder": extractor}, NEEDS, tmp_path)
    [path] = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=rf"{path.name}: damaged .* remove it, and it is made again"):
        extract_once(images(0), {"encoder": extractor}, NEEDS, tmp_path)


def test_a_known_reference_gives_the_same_result(extractor: EncoderExtractor, tmp_path: Path) -> None:
    protocol = encoder_protocol("tiny", metrics=["fd", "precision_recall"])
    extractors = {"encoder": extractor}
    for _ in range(2):
        known = look_at_reference(images(1), protocol, extractors, tmp_path, keep=True)
        assert isinstance(known, KnownReference)
        first = evaluate_generation(images(0), known, protocol, extractors).as_dict()
        second = evaluate_generation(images(0), images(1), protocol, extractors).as_dict()
        assert {**first, "wall_time_s": 0} == {**second, "wall_time_s": 0}


METRICS: list[MetricName] = ["fd", "kid", "precision_recall", "density_coverage", "mind", "cmmd"]


def small_protocol(metric: MetricName) -> EvaluationProtocol:
    return dataclasses.replace(encoder_protocol("tiny", metrics=[metric]), kernel=KernelRule(2, 7))


def side(count: int) -> Side:
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(count))
    moments = FeatureMoments(4)
    moments.update(features)
    statistics = {"encoder.features": moments.statistics()} if count > 1 else {}
    return Side(statistics, {"encoder.features": features})


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_refused_beforehand_is_what_cannot_be_measured(metric: MetricName) -> None:
    protocol = small_protocol(metric)
    least = least_images(protocol, metric)
    for count in range(2, 10):
        for samples, reference in ((side(count), side(9)), (side(9), side(count))):
            assert bool(measure(protocol, samples, reference).left_out) == (count < least)
        for check in (
            partial(require_enough_samples, protocol, count),
            partial(require_enough_reference, protocol, side(count)),
        ):
            if count >= least:
                check()
                continue
            with pytest.raises(UserError, match=rf"^{metric} .*at least {least} .*got {count}"):
                check()


@pytest.mark.parametrize("count", range(2, 14))
def test_an_inception_score_needs_an_image_in_each_split(count: int) -> None:
    protocol = load_protocol("torch-fidelity")
    [space] = protocol.spaces
    protocol = dataclasses.replace(protocol, spaces=[dataclasses.replace(space, metrics=["inception_score"])])
    splits = protocol.inception_score.splits
    if count >= splits:
        require_enough_samples(protocol, count)
        assert split_of_position(torch.arange(count), count, splits).unique().tolist() == list(range(splits))
        return
    with pytest.raises(UserError, match=f"^inception_score needs at least 10 samples, got {count}"):
        require_enough_samples(protocol, count)
    with pytest.raises(UserError, match="10 splits"):
        split_of_position(torch.arange(count), count, splits)


@pytest.mark.parametrize("metric", METRICS)
def test_statistics_alone_serve_distances_of_moments(metric: MetricName) -> None:
    bare = Side(side(9).statistics, {})
    if metric == "fd":
        require_enough_reference(small_protocol(metric), bare)
        return
    with pytest.raises(UserError, match=f"^{metric} cannot be measured: .*statistics alone"):
        require_enough_reference(small_protocol(metric), bare)

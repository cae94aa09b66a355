from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from repagen.errors import UserError
from repagen.evaluation import (
    EncoderExtractor,
    ExtractorIdentity,
    GenerationResult,
    InceptionExtractor,
    PipelineImages,
    TensorImages,
    encoder_protocol,
    evaluate_generation,
    frechet_distance,
    load_protocol,
    load_statistics,
    save_statistics,
)
from repagen.evaluation.metrics.ratios import Normaliser

ALL = ("fd", "precision_recall", "kid", "mind", "cmmd", "density_coverage")


def images_of(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


@pytest.fixture
def sides(random_pictures: Any) -> tuple[TensorImages, TensorImages]:
    return tuple(TensorImages(images_of(random_pictures(n, seed=n)), f"set of {n}") for n in (60, 80))  # type: ignore[return-value]


def evaluate(
    sides: tuple[TensorImages, Any], extractor: EncoderExtractor, metrics: tuple[str, ...] = ALL, **options: Any
) -> GenerationResult:
    protocol = encoder_protocol("tiny", metrics=metrics)  # type: ignore[arg-type]
    protocol.kernel.subset_size = 30
    return evaluate_generation(*sides, protocol, {"encoder": extractor}, **options)


def test_every_metric_comes_from_one_pass_over_the_images(sides: Any, encoder: Any) -> None:
    class Counting(EncoderExtractor):
        batches = 0

        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            Counting.batches += 1
            return super().__call__(images)

    result = evaluate(sides, Counting(encoder))
    assert Counting.batches == 2 + 3
    assert set(result.metrics) == {
        *("fd_encoder", "precision_encoder", "recall_encoder", "kid_encoder", "kid_std_encoder"),
        *("mind_encoder", "cmmd_encoder", "density_encoder", "coverage_encoder"),
    }
    assert not result.left_out
    assert result.counts["precision_encoder"] == (60, 80)
    features = [EncoderExtractor(encoder)(side.images)["features"] for side in sides]
    assert result.metrics["fd_encoder"] == pytest.approx(frechet_distance(*features), rel=1e-6)


def test_a_set_against_itself_is_perfect(sides: Any, extractor: EncoderExtractor) -> None:
    result = evaluate((sides[0], sides[0]), extractor)
    assert result.metrics["fd_encoder"] < 1e-6
    assert (result.metrics["precision_encoder"], result.metrics["recall_encoder"]) == (1, 1)
    assert result.metrics["mind_encoder"] == 0
    assert result.metrics["coverage_encoder"] == 1


def test_the_result_says_what_it_depends_on(sides: Any, extractor: EncoderExtractor) -> None:
    result = json.loads(json.dumps(evaluate(sides, extractor).as_dict()))
    assert (result["schema"], result["kind"], result["protocol"]) == (1, "generation", "custom")
    assert result["settings"]["spaces"][0]["extractor"]["model"] == "tiny"
    assert (result["num_samples"], result["num_reference"]) == (60, 80)
    assert result["spaces"]["encoder"]["weights_sha256"] == extractor.identity.weights_sha256
    assert result["samples"]["pixels_sha256"] != result["reference"]["pixels_sha256"]
    assert result["versions"]["torch"] and result["versions"]["device"] == "cpu"
    assert result["wall_time_s"] > 0
    assert not result["comparable"] and len(result["remarks"]) == 2 and "at least 2048" in result["remarks"][0]


def test_the_table_has_every_figure_and_what_it_depends_on(sides: Any, extractor: EncoderExtractor) -> None:
    result = evaluate(sides, extractor)
    lines = dict(line.split("  ", 1) for line in result.table().splitlines())
    shown = lines["Frechet distance, encoder"].strip()
    assert shown == f"{result.metrics['fd_encoder']:.6g}  (not comparable)"
    assert " +- " in lines["kid_encoder"] and "(60 samples, 80 reference images)" in lines["kid_encoder"]
    assert {"protocol", "N", "space encoder", "samples", "reference", "versions", "wall time"} <= set(lines)


def test_statistics_stand_in_for_reference_images(sides: Any, extractor: EncoderExtractor, tmp_path: Path) -> None:
    from_images = evaluate(sides, extractor)
    path = tmp_path / "reference.npz"
    save_statistics(path, from_images.reference_statistics, from_images.spaces, from_images.reference)
    from_file = evaluate((sides[0], load_statistics(path)), extractor)
    assert from_file.metrics == pytest.approx({"fd_encoder": from_images.metrics["fd_encoder"]}, rel=1e-9)
    assert set(from_file.left_out) == {
        *("precision_encoder", "kid_encoder", "mind_encoder", "cmmd_encoder", "density_encoder"),
    }
    assert "statistics alone" in from_file.left_out["kid_encoder"]
    assert from_file.num_reference == 80
    assert from_file.reference["of"] == from_images.reference


def test_a_metric_that_needs_more_images_does_not_cost_the_others(sides: Any, extractor: EncoderExtractor) -> None:
    protocol = encoder_protocol("tiny", metrics=ALL)
    result = evaluate_generation(*sides, protocol, {"encoder": extractor})
    assert set(result.left_out) == {"kid_encoder"}
    assert "subset_size=1000" in result.left_out["kid_encoder"]
    assert "left out: KID" in result.table()


def test_features_are_kept_for_metrics_of_single_images_up_to_their_cap(
    sides: Any, extractor: EncoderExtractor
) -> None:
    protocol = encoder_protocol("tiny", metrics=("precision_recall", "density_coverage"))
    protocol.precision_recall.num_samples, protocol.precision_recall.num_reference = 20, 30
    result = evaluate_generation(*sides, protocol, {"encoder": extractor})
    assert result.counts == {"precision_encoder": (20, 30), "density_encoder": (60, 80)}


@pytest.mark.parametrize("kind", ["statistics", "images"])
def test_a_reference_of_another_kind_is_refused(
    sides: Any, extractor: EncoderExtractor, tmp_path: Path, kind: Any
) -> None:
    protocol = encoder_protocol("tiny")
    protocol.reference.kind = kind
    result = evaluate(sides, extractor)
    save_statistics(tmp_path / "r.npz", result.reference_statistics, result.spaces, {})
    reference = sides[1] if kind == "statistics" else load_statistics(tmp_path / "r.npz")
    with pytest.raises(UserError, match=f"protocol mine compares with {kind}"):
        evaluate_generation(sides[0], reference, protocol, {"encoder": extractor}, name="mine")


def test_samples_of_another_size_are_refused(sides: Any, extractor: EncoderExtractor, random_pictures: Any) -> None:
    larger = TensorImages(images_of(random_pictures(9, seed=0, size=32)))
    with pytest.raises(UserError, match="samples: images are 32x32, those of the reference 16x16"):
        evaluate((larger, sides[1]), extractor)


def test_what_the_protocol_does_not_say_is_named(sides: Any, extractor: EncoderExtractor) -> None:
    protocol = encoder_protocol("tiny", metrics=("fd",))
    protocol.num_samples, protocol.image_size = 50_000, 256
    result = evaluate_generation(*sides, protocol, {"encoder": extractor}, name="mine")
    assert result.deviations == (
        "60 samples, the protocol says 50000",
        "samples are 16x16, the protocol says 256 px",
    )
    assert not result.comparable
    assert result.table().count("deviates") == 2


def test_a_pipelines_labels_and_rounding_may_deviate(
    pipeline_folder: Path, sides: Any, extractor: EncoderExtractor
) -> None:
    import repagen

    protocol = encoder_protocol("tiny", metrics=("fd",))
    protocol.label_mode, protocol.rounding, protocol.sampling_dtype = "random", "truncate", "bfloat16"
    pipeline = repagen.ClassToImagePipeline.from_pretrained(pipeline_folder)
    samples = PipelineImages(pipeline, 10, label_mode="balanced", num_inference_steps=1)
    result = evaluate_generation(samples, sides[1], protocol, {"encoder": extractor})
    assert result.deviations == (
        "label_mode=balanced, the protocol says random",
        "rounding=round, the protocol says truncate",
        "dtype=float32, the protocol says bfloat16",
    )


def test_too_few_images_for_the_splits_cost_the_inception_score_alone(
    inception_file: Path, random_pictures: Any
) -> None:
    sides = [TensorImages(images_of(random_pictures(3, seed=seed, size=16))) for seed in (1, 2)]
    result = evaluate_generation(
        *sides, load_protocol("torch-fidelity"), {"inception": InceptionExtractor(inception_file)}
    )
    assert set(result.metrics) == {"fid"}
    assert "at least 10 images, one for each split" in result.left_out["inception_score"]


def test_another_reference_than_the_protocol_says_is_a_deviation(sides: Any, extractor: EncoderExtractor) -> None:
    protocol = encoder_protocol("tiny", metrics=("fd",))
    protocol.reference.layout, protocol.reference.description = "ADM", "the file of ADM"
    result = evaluate_generation(*sides, protocol, {"encoder": extractor})
    assert result.deviations == ("the reference is not the file of ADM, which the protocol says",)


def test_a_metric_that_is_named_twice_counts_once(sides: Any, extractor: EncoderExtractor) -> None:
    protocol = encoder_protocol("tiny", metrics=("fd",))
    once = evaluate_generation(*sides, protocol, {"encoder": extractor})
    protocol.spaces[0].metrics = ["fd", "fd"]
    twice = evaluate_generation(*sides, protocol, {"encoder": extractor})
    assert twice.metrics == once.metrics and twice.num_reference == once.num_reference == 80


# --- ratios --------------------------------------------------------------------------------------------------------


def test_the_ratio_divides_by_the_table(sides: Any, extractor: EncoderExtractor) -> None:
    table = {"encoder": Normaliser(0.5, extractor.identity)}
    result = evaluate(sides, extractor, ("fd", "fdr"), normalisers=table)
    assert result.metrics["fdr"] == pytest.approx(result.metrics["fd_encoder"] / 0.5)
    without = evaluate(sides, extractor, ("fd", "fdr"))
    assert "no table of normalisers" in without.left_out["fdr"]


@pytest.mark.parametrize(
    ("normaliser", "message"),
    [
        (Normaliser(0.5, ExtractorIdentity("other", "0", "none")), "measured with other"),
        (Normaliser(0.5, None, "0123456789abcdef"), "belongs to reference 0123456789ab"),
    ],
)
def test_a_table_of_something_else_is_refused(
    sides: Any, extractor: EncoderExtractor, normaliser: Normaliser, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(sides, extractor, ("fd", "fdr"), normalisers={"encoder": normaliser})


# --- Inception -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_of_adms_metrics(inception_file: Path, random_pictures: Any) -> None:
    samples, reference = (images_of(random_pictures(24, seed=seed, size=32)) for seed in (1, 2))
    protocol = load_protocol("adm256")
    protocol.reference.kind, protocol.inception_score.splits = "any", 4
    extractor = InceptionExtractor(inception_file)
    result = evaluate_generation(
        TensorImages(samples), TensorImages(reference), protocol, {"inception": extractor}, name="adm256"
    )
    assert set(result.metrics) == {
        *("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall"),
    }
    one, other = (extractor(images) for images in (samples, reference))
    assert result.metrics["fid"] == pytest.approx(frechet_distance(one["pool"], other["pool"]), rel=1e-4)
    assert result.metrics["sfid"] == pytest.approx(frechet_distance(one["spatial"], other["spatial"]), rel=1e-4)
    score = isc_features_to_metric(one["logits"], splits=4, shuffle=False)
    assert result.metrics["inception_score"] == pytest.approx(score["inception_score_mean"], rel=1e-5)
    assert result.metrics["inception_score"] > 1.01
    assert "Inception weights are not the published ones" in result.remarks


def test_the_resolved_protocol_is_kept(sides: Any, extractor: EncoderExtractor) -> None:
    protocol = encoder_protocol("tiny", metrics=("fd",))
    result = evaluate_generation(*sides, protocol, {"encoder": extractor})
    assert result.settings == dataclasses.asdict(protocol)

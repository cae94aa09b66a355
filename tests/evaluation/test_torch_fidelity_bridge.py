"""Our figures against those of torch-fidelity's own program, for the same images: they are the same numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from repagen.errors import UserError
from repagen.evaluation import (
    EncoderExtractor,
    FolderImages,
    InceptionExtractor,
    encoder_protocol,
    evaluate_generation,
    load_protocol,
    load_statistics,
)
from repagen.evaluation.extraction import Needs, extract
from repagen.evaluation.reference_building import make_reference
from repagen.evaluation.torch_fidelity_bridge import register_with_torch_fidelity

EQUAL = {"rel": 1e-6, "abs": 1e-9}
QUIET = {"cuda": False, "save_cpu_ram": True, "verbose": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, random_pictures: Any, write_pictures: Any) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pictures")
    samples = random_pictures(120, seed=1) // 2 + 70
    return str(write_pictures(root / "samples", samples)), str(write_pictures(root / "real", random_pictures(150, 2)))


@pytest.fixture(scope="module")
def registered(encoder: Any) -> str:
    return register_with_torch_fidelity(EncoderExtractor(encoder), "tiny-encoder")


def test_metrics_in_an_encoders_space_are_torch_fidelitys(
    folders: tuple[str, str], registered: str, encoder: Any, tmp_path: Path
) -> None:
    extractors = {"encoder": EncoderExtractor(encoder)}
    theirs = torch_fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        feature_extractor=registered,
        feature_layer_isc="features",
        kid_subsets=30,
        kid_subset_size=50,
        batch_size=17,
        **QUIET,
    )
    protocol = encoder_protocol("tiny", metrics=["fd", "kid", "precision_recall"])
    protocol.kernel.subsets, protocol.kernel.subset_size = 30, 50
    ours = evaluate_generation(*map(FolderImages, folders), protocol, extractors).metrics
    assert ours["fd_encoder"] == pytest.approx(theirs["frechet_inception_distance"], **EQUAL)
    assert ours["kid_encoder"] == pytest.approx(theirs["kernel_inception_distance_mean"], **EQUAL)
    assert ours["kid_std_encoder"] == pytest.approx(theirs["kernel_inception_distance_std"], **EQUAL)
    assert ours["precision_encoder"] == pytest.approx(theirs["precision"], **EQUAL)
    assert ours["recall_encoder"] == pytest.approx(theirs["recall"], **EQUAL)
    assert ours["fd_encoder"] > 0.01 and 0 < theirs["recall"] < 1
    needs = Needs(scored=("encoder.features", 10, "torch-fidelity"))
    sums = extract(FolderImages(folders[0]), extractors, needs, tmp_path).score
    assert sums is not None
    score = sums.result()
    assert score.mean == pytest.approx(theirs["inception_score_mean"], **EQUAL)
    assert score.std == pytest.approx(theirs["inception_score_std"], **EQUAL)


def test_our_statistics_planted_in_torch_fidelitys_cache_give_our_distance(
    folders: tuple[str, str], registered: str, encoder: Any, tmp_path: Path
) -> None:
    extractors = {"encoder": EncoderExtractor(encoder)}
    make_reference(tmp_path / "real.npz", FolderImages(folders[1]), extractors)
    reference = load_statistics(tmp_path / "real.npz")
    [statistics] = reference.statistics.values()
    planted = {"mu": statistics.mean.numpy().astype(np.float32), "sigma": statistics.covariance.numpy()}
    torch.save(planted, tmp_path / f"ours-{registered}-stat-fid-features.pt")
    theirs = torch_fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[0],  # looked at for its existence alone
        input2_cache_name="ours",
        cache_root=str(tmp_path),
        fid=True,
        feature_extractor=registered,
        **QUIET,
    )
    protocol = encoder_protocol("tiny", metrics=["fd"])
    ours = evaluate_generation(FolderImages(folders[0]), reference, protocol, extractors).metrics
    assert ours["fd_encoder"] == pytest.approx(theirs["frechet_inception_distance"], **EQUAL)
    assert ours["fd_encoder"] > 0.01


def test_nothing_of_ours_switches_xformers_off(
    folders: tuple[str, str], registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch-fidelity's own DINOv2 extractors do, for the whole process."""
    monkeypatch.delenv("XFORMERS_DISABLED", raising=False)
    torch_fidelity.calculate_metrics(input1=folders[0], isc=True, feature_layer_isc="features",
                                     feature_extractor=registered, **QUIET)  # fmt: skip
    assert "XFORMERS_DISABLED" not in os.environ


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception-v3-compat", "has an extractor 'inception-v3-compat' already"),
        ("org/encoder", "must be a word without '/'"),
        (" spaced", "must be a word"),
        ("", "must be a word"),
    ],
)
def test_names_that_cannot_be_registered_are_refused(encoder: Any, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register_with_torch_fidelity(EncoderExtractor(encoder), name)


def test_the_inception_score_asks_for_logits(folders: tuple[str, str], registered: str) -> None:
    with pytest.raises(UserError, match="has no logits for the Inception Score; give feature_layer_isc"):
        torch_fidelity.calculate_metrics(input1=folders[0], isc=True, feature_extractor=registered, **QUIET)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the published file, scaled so that features differ from image to image."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with torch.random.fork_rng(), mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        torch.manual_seed(0)
        torch.save({}, path)
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.slow
def test_inceptions_metrics_are_torch_fidelitys(
    inception_file: Path, tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    samples = write_pictures(tmp_path / "samples", random_pictures(24, seed=1, size=32) // 2 + 70)
    real = write_pictures(tmp_path / "real", random_pictures(28, seed=2, size=32))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(samples),
        input2=str(real),
        input1_cache_name="samples",
        input2_cache_name="real",
        cache_root=str(tmp_path),
        fid=True,
        kid=True,
        prc=True,
        isc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        kid_subsets=20,
        kid_subset_size=20,
        **QUIET,
    )
    protocol = load_protocol("torch-fidelity")
    protocol.kernel.subsets, protocol.kernel.subset_size = 20, 20
    extractors = {"inception": InceptionExtractor(inception_file)}
    ours = evaluate_generation(FolderImages(samples), FolderImages(real), protocol, extractors).metrics
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], **EQUAL)
    assert ours["inception_score_std"] == pytest.approx(theirs["inception_score_std"], **EQUAL)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], **EQUAL)
    assert ours["kid_std"] == pytest.approx(theirs["kernel_inception_distance_std"], **EQUAL)
    assert ours["precision"] == pytest.approx(theirs["precision"], **EQUAL)
    assert ours["recall"] == pytest.approx(theirs["recall"], **EQUAL)
    cached = (tmp_path / f"{name}-inception-v3-compat-features-2048.pt" for name in ("samples", "real"))
    features = [torch.load(path, weights_only=True).double().numpy() for path in cached]
    assert ours["fid"] == pytest.approx(distance_in_the_span(*features), **EQUAL)
    # With fewer images than features, torch-fidelity adds up the roots of 2,000 eigenvalues that are rounding.
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=2e-4)
    assert ours["fid"] > 0.1


def distance_in_the_span(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance by torch-fidelity's formula; the eigenvalues of S_a S_b but for those that are zero.

    S_a S_b = A^T (A B^T) B has the eigenvalues of (A B^T)(B A^T), a matrix of as many rows as there are images.
    """
    centred_a, centred_b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    cross = centred_a @ centred_b.T
    roots = np.sqrt(np.linalg.eigvals(cross @ cross.T).astype(complex)).real.sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return float(shift @ shift + (centred_a**2).sum() + (centred_b**2).sum() - 2 * roots)

"""Files of statistics: layouts, exact round trips, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repagen.errors import UserError
from repagen.evaluation import (
    EncoderExtractor,
    ExtractorIdentity,
    FolderImages,
    NpzImages,
    ReferenceStatistics,
    Statistics,
    encoder_protocol,
    evaluate_generation,
    load_protocol,
    load_statistics,
    open_reference,
    save_statistics,
)
from repagen.evaluation.generation import require_reference, require_statistics

IDENTITY = ExtractorIdentity("org/encoder", "ab" * 32, "pooling=mean, size=16, kernel=pillow-bicubic")
INCEPTION = ExtractorIdentity("inception-v3-compat", "6726825d" + "0" * 56, "size=299, kernel=tensorflow1-bilinear")
FEATURE = "encoder.features"


def gaussian(dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(3 * dimension, dimension))
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.fixture
def statistics() -> Statistics:
    mean, covariance = gaussian(4, seed=0)
    return Statistics(torch.from_numpy(mean), torch.from_numpy(covariance), 5000)


@pytest.fixture
def saved(tmp_path: Path, statistics: Statistics) -> Path:
    path = tmp_path / "reference.npz"
    save_statistics(path, {FEATURE: statistics}, {"encoder": IDENTITY}, {"kind": "folder", "path": "photos"})
    return path


# --- layouts -------------------------------------------------------------------------------------------------------


def test_saved_statistics_come_back_whole(saved: Path, statistics: Statistics) -> None:
    loaded = load_statistics(saved)
    assert torch.equal(loaded.statistics[FEATURE].mean, statistics.mean)
    assert torch.equal(loaded.statistics[FEATURE].covariance, statistics.covariance)
    assert loaded.statistics[FEATURE].count == 5000
    assert loaded.extractors == {"encoder": IDENTITY}
    assert loaded.protocol == {"kind": "folder", "path": "photos"}
    assert loaded.layout == "repagen" and loaded.versions["numpy"] == np.__version__
    assert loaded.images is None
    assert [file.name for file in saved.parent.iterdir()] == ["reference.npz"]


def test_the_adm_layout_is_read_and_written_bit_by_bit(tmp_path: Path, random_pictures: Any) -> None:
    pool, spatial, pictures = gaussian(6, seed=1), gaussian(5, seed=2), random_pictures(3, seed=0)
    arrays = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*pool, *spatial), strict=True))
    np.savez(tmp_path / "adm.npz", **arrays, arr_0=pictures)
    np.save(tmp_path / "images.npy", pictures)
    reference = open_reference([str(tmp_path / "adm.npz")])
    assert isinstance(reference, ReferenceStatistics) and reference.layout == "ADM"
    assert reference.images is not None and len(reference.images) == 3
    assert all(one.count is None for one in reference.statistics.values()) and not reference.extractors
    save_statistics(
        tmp_path / "ours.npz", reference.statistics, {"inception": INCEPTION}, {}, images=tmp_path / "images.npy"
    )
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:
        for name, array in {**arrays, "arr_0": pictures}.items():
            assert ours[name].dtype == array.dtype and np.array_equal(ours[name], array)
    carried = load_statistics(tmp_path / "ours.npz").images
    assert carried is not None
    assert np.array_equal(torch.stack(carried.load(range(3))).permute(0, 2, 3, 1).numpy(), pictures)  # type: ignore[arg-type]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["edm", "clean-fid and pytorch-fid"])
def test_mu_and_sigma_alone_are_taken_for_inceptions(tmp_path: Path, save: Any) -> None:
    mean, covariance = gaussian(6, seed=1)
    save(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    reference = load_statistics(tmp_path / "edm.npz")
    assert reference.layout == "mu and sigma" and [*reference.statistics] == ["inception.pool"]
    assert np.array_equal(reference.statistics["inception.pool"].covariance.numpy(), covariance)
    reference.require_extractor("inception", INCEPTION)


def test_fd_losss_two_poolings_are_told_apart(tmp_path: Path) -> None:
    first, mean = gaussian(6, seed=1), gaussian(6, seed=2)
    np.savez(tmp_path / "vit.npz", mu=first[0], sigma=first[1], avg_mu=mean[0], avg_sigma=mean[1])
    reference = load_statistics(tmp_path / "vit.npz")
    assert reference.layout == "FD-Loss"
    assert np.array_equal(reference.statistics["unnamed.features"].mean.numpy(), first[0])
    assert np.array_equal(reference.statistics["unnamed.mean"].covariance.numpy(), mean[1])


def test_a_path_is_opened_for_what_it_is(saved: Path, random_pictures: Any, write_pictures: Any) -> None:
    folder, pictures = saved.parent, random_pictures(2, seed=0)
    write_pictures(folder / "folder", pictures)
    np.savez(folder / "images.npz", arr_0=pictures)
    assert isinstance(open_reference([str(saved)]), ReferenceStatistics)
    assert isinstance(open_reference([str(folder / "folder")]), FolderImages)
    assert isinstance(open_reference([str(folder / "images.npz")]), NpzImages)
    assert len(open_reference(["data.kind=digits", "data.subset=train", "data.image_size=32"])) > 1000  # type: ignore[arg-type]


# --- another extractor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"weights_sha256": "cd" * 32},
        {"settings": IDENTITY.settings.replace("mean", "cls")},
        {"settings": IDENTITY.settings.replace("pillow-bicubic", "torch-bicubic-antialias")},
    ],
    ids=["weights", "pooling", "kernel"],
)
def test_statistics_of_another_extractor_are_refused(saved: Path, change: dict[str, str]) -> None:
    reference = load_statistics(saved)
    reference.require_extractor("encoder", dataclasses.replace(IDENTITY, name="a copy of it"))
    with pytest.raises(UserError, match=r"reference\.npz: made with org/encoder .*, but the extractor is"):
        reference.require_extractor("encoder", dataclasses.replace(IDENTITY, **change))


def test_statistics_of_another_space_are_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="holds statistics of encoder, none of dinov2"):
        load_statistics(saved).require_extractor("dinov2", IDENTITY)


@pytest.mark.parametrize(
    "identity",
    [IDENTITY, dataclasses.replace(INCEPTION, settings="size=299, kernel=pillow-bicubic-float")],
    ids=["an encoder", "clean-fid's kernel"],
)
def test_files_that_say_nothing_serve_inception_with_tensorflows_kernel_alone(
    tmp_path: Path, identity: ExtractorIdentity
) -> None:
    mean, covariance = gaussian(6, seed=1)
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    with pytest.raises(UserError, match="does not say which extractor made it"):
        load_statistics(tmp_path / "edm.npz").require_extractor("inception", identity)


@pytest.mark.parametrize(
    ("dimension", "eigenvalue", "message"),
    [
        (8, 1.0, r"8 features of encoder\.features, but the extractor gives 16"),
        (16, -0.5, r"sigma of encoder\.features is not a covariance: eigenvalues from -0\.5 to 1"),
    ],
)
def test_statistics_that_cannot_be_compared_are_refused_before_sampling(
    extractor: EncoderExtractor, tmp_path: Path, dimension: int, eigenvalue: float, message: str
) -> None:
    covariance = torch.eye(dimension, dtype=torch.float64)
    covariance[0, 0] = eigenvalue
    wrong = {FEATURE: Statistics(torch.zeros(dimension, dtype=torch.float64), covariance, 100)}
    save_statistics(tmp_path / "wrong.npz", wrong, {"encoder": extractor.identity}, {})
    with pytest.raises(UserError, match=message):
        require_statistics(encoder_protocol("tiny"), load_statistics(tmp_path / "wrong.npz"), {"encoder": extractor})


def test_metrics_of_single_images_need_no_statistics_of_their_space(
    tmp_path: Path, extractor: EncoderExtractor, random_pictures: Any, write_pictures: Any
) -> None:
    """The features of the images that a file carries are taken here, whatever made its statistics."""
    mean, covariance = gaussian(6, seed=1)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, arr_0=random_pictures(20, seed=1))
    samples = FolderImages(write_pictures(tmp_path / "samples", random_pictures(20, seed=2)))
    protocol = encoder_protocol("tiny", metrics=["precision_recall"])
    result = evaluate_generation(samples, load_statistics(tmp_path / "adm.npz"), protocol, {"encoder": extractor})
    assert result.metrics["precision_encoder"] > 0.3


# --- the wrong kind ------------------------------------------------------------------------------------------------


def test_images_where_the_protocol_wants_statistics_are_refused(
    tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    images = FolderImages(write_pictures(tmp_path, random_pictures(2, seed=0)))
    with pytest.raises(UserError, match=r"protocol adm256 compares with statistics .*, but images are given"):
        require_reference(load_protocol("adm256"), "adm256", images)


def test_the_reference_of_another_size_is_refused(tmp_path: Path) -> None:
    mean, covariance = gaussian(6, seed=1)
    pictures = np.zeros((1, 512, 512, 3), np.uint8)
    np.savez(tmp_path / "adm512.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, arr_0=pictures)
    with pytest.raises(UserError, match="adm256 is for 256 px, but the images in the reference are 512x512"):
        require_reference(load_protocol("adm256"), "adm256", load_statistics(tmp_path / "adm512.npz"))


# --- damaged files -------------------------------------------------------------------------------------------------


def not_a_number(size: int) -> np.ndarray:
    mean = np.zeros(size)
    mean[1] = np.nan
    return mean


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "need the arrays mu and sigma, found arr_0"),
        ({"mu": np.zeros(3)}, "need the arrays mu and sigma, found mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\) must be"),
        ({"mu": np.zeros(3), "sigma": np.ones((3, 4))}, r"mu \(3,\) and sigma \(3, 4\) must be"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"mu \(1, 3\) and sigma \(3, 3\) must be"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu \(0,\) and sigma \(0, 0\) must be"),
        ({"mu": not_a_number(3), "sigma": np.eye(3)}, "mu and sigma are not finite"),
        ({"mu": np.zeros(3), "sigma": np.diag([1, 1, np.inf])}, "mu and sigma are not finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "sigma is not symmetric"),
        ({"mu": np.array([None, 1], dtype=object), "sigma": np.eye(2)}, "cannot be read"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "cannot be read"),
        ({"repagen": np.array("{not json"), "mu": np.zeros(2), "sigma": np.eye(2)}, "cannot be read"),
        ({"repagen": np.array("[1]"), "mu": np.zeros(2), "sigma": np.eye(2)}, "cannot be read"),
        (
            {
                "repagen": np.array(
                    json.dumps({"counts": {"inception.pool": 1}, "extractors": {}, "protocol": {}, "versions": {}})
                ),
                "mu": np.zeros(2),
                "sigma": np.eye(2),
            },
            "said to be of 1 images",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as caught:
        load_statistics(tmp_path / "reference.npz")
    assert "\n" not in str(caught.value) and "reference.npz" in str(caught.value)


def test_truncated_and_flipped_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for keep in (0, 10, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:keep])
        with pytest.raises(UserError, match=r"reference\.npz: (not an npz file|cannot be read)"):
            open_reference([str(saved)])
    at = content.index(b"sigma_") + 200
    saved.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"reference\.npz: cannot be read"):
        open_reference([str(saved)])


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    for name in ("edm2.pkl", "edm2.npz"):
        (tmp_path / name).write_bytes(pickle.dumps({"fid": Bomb()}))
    with pytest.raises(UserError, match=r"a pickle runs code .* at your own risk"):
        open_reference([str(tmp_path / "edm2.pkl")])
    with pytest.raises(UserError, match="a pickle runs code"):
        load_statistics(tmp_path / "edm2.pkl")
    with pytest.raises(UserError, match="not an npz file"):
        open_reference([str(tmp_path / "edm2.npz")])
    np.savez(tmp_path / "object.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match="cannot be read"):
        load_statistics(tmp_path / "object.npz")

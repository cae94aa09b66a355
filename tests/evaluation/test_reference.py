from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from repagen.errors import UserError
from repagen.evaluation import (
    ExtractorIdentity,
    FolderImages,
    NpzImages,
    ReferenceStatistics,
    Statistics,
    load_statistics,
    open_reference,
    save_statistics,
)

IDENTITY = ExtractorIdentity("org/encoder", "ab" * 32, "pooling=mean, size=16")
INCEPTION_IDENTITY = ExtractorIdentity("inception-v3-compat", "6726825d" + "0" * 56, "layer=2048, size=299")


@pytest.fixture
def statistics() -> Statistics:
    root = torch.randn(4, 4, dtype=torch.float64)
    return Statistics(torch.randn(4, dtype=torch.float64), root @ root.T, 5000)


@pytest.fixture
def saved(tmp_path: Path, statistics: Statistics) -> Path:
    path = tmp_path / "reference.npz"
    save_statistics(path, statistics, IDENTITY, {"kind": "folder", "path": "photos"})
    return path


def test_saved_statistics_come_back_whole(saved: Path, statistics: Statistics) -> None:
    loaded = load_statistics(saved)
    assert torch.equal(loaded.statistics.mean, statistics.mean)
    assert torch.equal(loaded.statistics.covariance, statistics.covariance)
    assert loaded.statistics.count == 5000
    assert loaded.extractor == IDENTITY
    assert loaded.protocol == {"kind": "folder", "path": "photos"}
    assert loaded.images is None
    assert [file.name for file in saved.parent.iterdir()] == ["reference.npz"]


def test_other_tools_find_adms_keys(saved: Path, statistics: Statistics) -> None:
    with np.load(saved, allow_pickle=False) as file:
        assert np.array_equal(file["mu"], statistics.mean.numpy())
        assert np.array_equal(file["sigma"], statistics.covariance.numpy())


def test_the_adm_layout_is_read_with_its_images(tmp_path: Path, random_pictures: Any) -> None:
    pictures = random_pictures(3, seed=0)
    mean, covariance = np.zeros(2048, np.float32), np.eye(2048, dtype=np.float64)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, arr_0=pictures)
    reference = open_reference([str(tmp_path / "adm.npz")])
    assert isinstance(reference, ReferenceStatistics)
    assert reference.statistics.dimension == 2048 and reference.statistics.count is None
    assert reference.images is not None and len(reference.images) == 3
    reference.require_extractor(INCEPTION_IDENTITY)
    with pytest.raises(UserError, match="does not say which extractor made it"):
        reference.require_extractor(IDENTITY)


@pytest.mark.parametrize("change", [{"weights_sha256": "cd" * 32}, {"settings": "pooling=cls, size=16"}])
def test_statistics_of_another_extractor_are_refused(saved: Path, change: dict[str, str]) -> None:
    reference = load_statistics(saved)
    reference.require_extractor(dataclasses.replace(IDENTITY, name="a copy of it"))
    with pytest.raises(UserError, match=r"reference\.npz: made with org/encoder .*, but the extractor is"):
        reference.require_extractor(dataclasses.replace(IDENTITY, **change))


def test_a_path_is_opened_for_what_it_is(
    saved: Path, tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    tmp_path, pictures = saved.parent, random_pictures(2, seed=0)
    write_pictures(tmp_path / "folder", pictures)
    np.savez(tmp_path / "images.npz", arr_0=pictures)
    assert isinstance(open_reference([str(saved)]), ReferenceStatistics)
    assert isinstance(open_reference([str(tmp_path / "folder")]), FolderImages)
    assert isinstance(open_reference([str(tmp_path / "images.npz")]), NpzImages)
    assert len(open_reference(["data.kind=digits", "data.subset=train", "data.image_size=32"])) > 1000


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "need the arrays mu and sigma, found mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \(3,\) and sigma \(4, 4\) must be"),
        ({"mu": np.array([None, 1], dtype=object), "sigma": np.eye(2)}, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_reference([str(tmp_path / "reference.npz")])

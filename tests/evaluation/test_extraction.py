from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.errors import UserError
from repagen.evaluation import EncoderExtractor, FolderImages, NpzImages, frechet_distance
from repagen.evaluation.extraction import extract


def test_batch_size_does_not_matter(
    tmp_path: Path,
    extractor: EncoderExtractor,
    random_pictures: Any,
    write_pictures: Any,
) -> None:
    source = FolderImages(write_pictures(tmp_path, random_pictures(50, seed=0)))
    one, other = (extract(source, extractor, batch_size=size, keep_features=9) for size in (7, 50))
    # The same images in differently shaped float32 products: a few units of the last place.
    assert torch.allclose(one.statistics.covariance, other.statistics.covariance, rtol=1e-5, atol=1e-6)
    assert one.pixels_sha256 == other.pixels_sha256
    assert one.features.shape == (9, 16)
    assert torch.allclose(one.features, other.features, atol=1e-5)


def test_the_pixel_hash_sees_pixels_and_not_files(
    tmp_path: Path,
    extractor: EncoderExtractor,
    random_pictures: Any,
    write_pictures: Any,
) -> None:
    pictures = random_pictures(6, seed=0)
    np.savez(tmp_path / "samples.npz", arr_0=pictures)
    write_pictures(tmp_path / "png", pictures)
    pictures[5, 0, 0, 0] ^= 1
    write_pictures(tmp_path / "other", pictures)
    from_npz = extract(NpzImages(tmp_path / "samples.npz"), extractor).pixels_sha256
    assert extract(FolderImages(tmp_path / "png"), extractor).pixels_sha256 == from_npz
    assert extract(FolderImages(tmp_path / "other"), extractor).pixels_sha256 != from_npz


def test_bad_images_stop_the_run_or_are_left_out(
    tmp_path: Path,
    extractor: EncoderExtractor,
    random_pictures: Any,
    write_pictures: Any,
) -> None:
    pictures = random_pictures(300, seed=1)
    bad = set(np.random.default_rng(0).choice(300, 37, replace=False).tolist())
    folder = write_pictures(tmp_path / "all", pictures)
    for number in bad:
        (folder / f"{number:05d}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    clean = write_pictures(tmp_path / "clean", np.delete(pictures, sorted(bad), axis=0))
    with pytest.raises(UserError, match="37 unreadable images, 36 allowed") as caught:
        extract(FolderImages(folder), extractor, max_bad_images=36)
    assert all(f"{number:05d}.png" in str(caught.value) for number in bad)
    result = extract(FolderImages(folder), extractor, max_bad_images=50)
    expected = extract(FolderImages(clean), extractor)
    reference = torch.randn(100, 16)
    assert result.count == 263
    assert [image.name for image in result.unreadable] == [f"{number:05d}.png" for number in sorted(bad)]
    assert result.pixels_sha256 == expected.pixels_sha256
    assert frechet_distance(result.statistics, reference) == pytest.approx(
        frechet_distance(expected.statistics, reference), rel=1e-6
    )


def test_images_of_several_sizes_are_refused_by_name(
    tmp_path: Path,
    extractor: EncoderExtractor,
    random_pictures: Any,
    write_pictures: Any,
) -> None:
    write_pictures(tmp_path, random_pictures(3, seed=0))
    Image.new("RGB", (12, 10)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"00000\.png is 16x16, odd\.png is 12x10; crop them first"):
        extract(FolderImages(tmp_path), extractor)


def test_a_feature_that_is_not_finite_names_the_image(
    tmp_path: Path,
    extractor: EncoderExtractor,
    random_pictures: Any,
    write_pictures: Any,
) -> None:
    class Diverging(EncoderExtractor):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            features = super().__call__(images)
            features[images.flatten(1).eq(255).all(dim=1)] = torch.inf
            return features

    pictures = random_pictures(5, seed=0)
    pictures[2] = 255
    with pytest.raises(UserError, match=r"features of 00002\.png are not finite"):
        extract(FolderImages(write_pictures(tmp_path, pictures)), Diverging(extractor.encoder))


def test_one_image_is_refused(
    tmp_path: Path,
    extractor: EncoderExtractor,
    random_pictures: Any,
    write_pictures: Any,
) -> None:
    source = FolderImages(write_pictures(tmp_path, random_pictures(1, seed=0)))
    with pytest.raises(UserError, match="at least 2 samples, got 1"):
        extract(source, extractor)

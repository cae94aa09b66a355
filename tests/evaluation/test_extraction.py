from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation import EncoderExtractor, FolderImages, ImageSource, NpzImages, TensorImages, frechet_distance
from repagen.evaluation.extraction import Extraction, Needs, extract

FEATURE = "encoder.features"


@pytest.fixture
def look(tmp_path: Path, extractor: EncoderExtractor) -> Callable[..., Extraction]:
    """Extract with the tiny encoder into a folder of its own."""
    folders = iter(range(1000))

    def run(source: ImageSource, keep: int = 0, **options: Any) -> Extraction:
        options.setdefault("extractors", {"encoder": extractor})
        options.setdefault("folder", tmp_path / f"features-{next(folders)}")
        needs = Needs(moments=(FEATURE,), kept={FEATURE: keep} if keep else {}, scored=(FEATURE, 2, "torch-fidelity"))
        return extract(source, needs=needs, **options)

    return run


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def test_moments_are_those_of_the_features(look: Any, extractor: EncoderExtractor, random_pictures: Any) -> None:
    images = as_tensor(random_pictures(75, seed=0))
    found = look(TensorImages(images), keep=1000)
    features = found.features[FEATURE]
    assert torch.allclose(features, extractor(images)["features"], atol=1e-5)
    statistics = found.statistics[FEATURE]
    assert torch.allclose(statistics.mean, features.double().mean(dim=0), rtol=1e-12)
    assert torch.allclose(statistics.covariance, torch.cov(features.double().T), rtol=1e-12)
    assert (found.count, statistics.count, found.image_size) == (75, 75, (16, 16))


def test_batch_size_does_not_matter_at_all(look: Any, random_pictures: Any) -> None:
    source = TensorImages(as_tensor(random_pictures(150, seed=0)))
    one, other = (look(source, keep=40, batch_size=size) for size in (7, 100))
    assert torch.equal(one.statistics[FEATURE].covariance, other.statistics[FEATURE].covariance)
    assert torch.equal(one.features[FEATURE], other.features[FEATURE])
    assert one.score.result() == other.score.result()
    assert one.pixels_sha256 == other.pixels_sha256
    assert one.features[FEATURE].shape == (40, 16)


def test_the_pixel_hash_sees_pixels_and_not_files(
    tmp_path: Path, look: Any, random_pictures: Any, write_pictures: Any
) -> None:
    pictures = random_pictures(6, seed=0)
    np.savez(tmp_path / "samples.npz", arr_0=pictures)
    write_pictures(tmp_path / "png", pictures)
    pictures[5, 0, 0, 0] ^= 1
    write_pictures(tmp_path / "other", pictures)
    from_npz = look(NpzImages(tmp_path / "samples.npz")).pixels_sha256
    assert look(FolderImages(tmp_path / "png")).pixels_sha256 == from_npz
    assert look(FolderImages(tmp_path / "other")).pixels_sha256 != from_npz


def break_some(folder: Path, count: int, of: int) -> list[int]:
    bad = sorted(np.random.default_rng(0).choice(of, count, replace=False).tolist())
    for number in bad:
        (folder / f"{number:05d}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return bad


def test_bad_images_stop_the_run_or_are_left_out(
    tmp_path: Path, look: Any, random_pictures: Any, write_pictures: Any
) -> None:
    pictures = random_pictures(300, seed=1)
    folder = write_pictures(tmp_path / "all", pictures)
    bad = break_some(folder, 37, 300)
    clean = write_pictures(tmp_path / "clean", np.delete(pictures, bad, axis=0))
    with pytest.raises(UserError, match="37 unreadable images, 36 allowed") as caught:
        look(FolderImages(folder), max_bad_images=36)
    assert all(f"{number:05d}.png" in str(caught.value) for number in bad)
    result, expected = look(FolderImages(folder), keep=200, max_bad_images=50), look(FolderImages(clean), keep=200)
    assert result.count == 263
    assert [image.name for image in result.unreadable] == [f"{number:05d}.png" for number in bad]
    assert result.pixels_sha256 == expected.pixels_sha256
    assert torch.equal(result.features[FEATURE], expected.features[FEATURE])
    reference = torch.randn(100, 16)
    distances = [frechet_distance(found.statistics[FEATURE], reference) for found in (result, expected)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-12)
    assert result.score.result().mean == pytest.approx(expected.score.result().mean, rel=1e-12)


@pytest.mark.slow
def test_of_ten_thousand_images_37_are_bad(
    tmp_path: Path, look: Any, random_pictures: Any, write_pictures: Any
) -> None:
    pictures = random_pictures(10_000, seed=1)
    folder = write_pictures(tmp_path / "all", pictures)
    bad = break_some(folder, 37, 10_000)
    with pytest.raises(UserError, match="37 unreadable images, 0 allowed") as caught:
        look(FolderImages(folder))
    assert all(f"{number:05d}.png" in str(caught.value) for number in bad)
    result = look(FolderImages(folder), max_bad_images=50)
    expected = look(TensorImages(as_tensor(np.delete(pictures, bad, axis=0))))
    reference = torch.randn(100, 16)
    distances = [frechet_distance(found.statistics[FEATURE], reference) for found in (result, expected)]
    assert result.count == 9963 and len(result.unreadable) == 37
    assert distances[0] == pytest.approx(distances[1], rel=1e-9)


def test_images_of_several_sizes_are_refused_by_name(
    tmp_path: Path, look: Any, random_pictures: Any, write_pictures: Any
) -> None:
    write_pictures(tmp_path, random_pictures(3, seed=0))
    Image.new("RGB", (12, 10)).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match=r"00000\.png is 16x16, odd\.png is 12x10; crop them first"):
        look(FolderImages(tmp_path))


def test_a_size_that_differs_between_blocks_is_refused_too(look: Any, random_pictures: Any) -> None:
    class Growing(TensorImages):
        def load(self, indices: Any) -> list[Any]:
            return [
                image if index < 32 else image.repeat(1, 2, 2)
                for index, image in zip(indices, super().load(indices), strict=True)
            ]

    with pytest.raises(UserError, match=r"tensor\[0\] is 16x16, tensor\[\d+\] is 32x32"):
        look(Growing(as_tensor(random_pictures(64, seed=0))[:, :, :16, :16]), batch_size=8)


def test_a_feature_that_is_not_finite_names_the_image(
    tmp_path: Path, look: Any, extractor: EncoderExtractor, random_pictures: Any, write_pictures: Any
) -> None:
    class Diverging(EncoderExtractor):
        def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            features = super().__call__(images)
            features["features"][images.flatten(1).eq(255).all(dim=1)] = torch.inf
            return features

    pictures = random_pictures(5, seed=0)
    pictures[2] = 255
    with pytest.raises(UserError, match=r"features of 00002\.png are not finite in encoder\.features"):
        look(FolderImages(write_pictures(tmp_path, pictures)), extractors={"encoder": Diverging(extractor.encoder)})


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(look: Any, random_pictures: Any, count: int) -> None:
    with pytest.raises(UserError, match=f"features: an evaluation needs at least 2 readable images, got {count}"):
        look(TensorImages(as_tensor(random_pictures(3, seed=0)[:count])))


class Counting:
    """An extractor that counts the images it looks at, or dies after some of them."""

    def __init__(self, extractor: EncoderExtractor, lives: float = float("inf")) -> None:
        self.extractor, self.lives, self.batches = extractor, lives, 0
        self.identity, self.dimensions = extractor.identity, extractor.dimensions

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.batches >= self.lives:
            raise KeyboardInterrupt
        self.batches += 1
        return self.extractor(images)


@pytest.mark.parametrize("lives", range(10))
def test_an_interrupted_pass_continues_where_it_was(
    tmp_path: Path, look: Any, extractor: EncoderExtractor, random_pictures: Any, lives: int
) -> None:
    source, folder = TensorImages(as_tensor(random_pictures(330, seed=0))), tmp_path / "features"
    with pytest.raises(KeyboardInterrupt):
        look(source, extractors={"encoder": Counting(extractor, lives)}, folder=folder, batch_size=64)
    rest = Counting(extractor)
    continued = look(source, extractors={"encoder": rest}, folder=folder, batch_size=96)
    whole = look(source)
    assert rest.batches == 11 - lives
    assert torch.equal(continued.statistics[FEATURE].covariance, whole.statistics[FEATURE].covariance)
    assert torch.equal(continued.statistics[FEATURE].mean, whole.statistics[FEATURE].mean)
    assert continued.score.result() == whole.score.result()
    assert continued.pixels_sha256 == whole.pixels_sha256


def test_damaged_features_are_made_again(
    tmp_path: Path, look: Any, extractor: EncoderExtractor, random_pictures: Any
) -> None:
    source, folder = TensorImages(as_tensor(random_pictures(130, seed=0))), tmp_path / "features"
    whole = look(source, folder=folder)
    features, facts = folder / "00000001.safetensors", folder / "00000003.json"
    content = bytearray(features.read_bytes())
    content[-5] ^= 1
    features.write_bytes(content)
    facts.write_text(facts.read_text()[:-20])
    (folder / "00000002.safetensors").unlink()
    again = Counting(extractor)
    continued = look(source, extractors={"encoder": again}, folder=folder)
    assert again.batches == 3
    assert torch.equal(continued.statistics[FEATURE].covariance, whole.statistics[FEATURE].covariance)


def test_blocks_of_changed_images_are_made_again(
    tmp_path: Path, look: Any, extractor: EncoderExtractor, random_pictures: Any, write_pictures: Any
) -> None:
    """One mended file of many does not cost the others."""
    folder, features = write_pictures(tmp_path / "images", random_pictures(130, seed=0)), tmp_path / "features"
    (folder / "00040.png").write_bytes(b"broken")
    assert look(FolderImages(folder), folder=features, max_bad_images=1).count == 129
    with pytest.raises(UserError, match=r"features: 1 unreadable images, 0 allowed: 00040\.png"):
        look(FolderImages(folder), folder=features)
    write_pictures(tmp_path / "mended", random_pictures(1, seed=9))
    (folder / "00040.png").write_bytes((tmp_path / "mended" / "00000.png").read_bytes())
    again = Counting(extractor)
    continued = look(FolderImages(folder), extractors={"encoder": again}, folder=features)
    assert again.batches == 1
    assert continued.pixels_sha256 == look(FolderImages(folder)).pixels_sha256


@pytest.mark.parametrize(("first", "second"), [(100, 140), (140, 100)])
def test_another_number_of_images_continues_with_that_number(
    tmp_path: Path, look: Any, extractor: EncoderExtractor, random_pictures: Any, first: int, second: int
) -> None:
    images = as_tensor(random_pictures(140, seed=0))
    look(TensorImages(images[:first]), folder=tmp_path / "features")
    continued = look(TensorImages(images[:second]), folder=tmp_path / "features")
    whole = look(TensorImages(images[:second]))
    assert continued.count == second
    assert continued.pixels_sha256 == whole.pixels_sha256
    assert torch.equal(continued.statistics[FEATURE].covariance, whole.statistics[FEATURE].covariance)


def test_features_of_other_extractors_are_not_taken(
    tmp_path: Path, look: Any, encoder: VisionEncoder, random_pictures: Any
) -> None:
    images = as_tensor(random_pictures(40, seed=0))
    look(TensorImages(images), folder=tmp_path / "features")
    with pytest.raises(UserError, match=r"\(extractors\); finish that one, remove the folder"):
        look(
            TensorImages(images),
            extractors={"encoder": EncoderExtractor(encoder, "cls")},
            folder=tmp_path / "features",
        )

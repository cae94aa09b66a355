"""`repagen reconstruct`: own images of any size through an autoencoder."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.data.images import center_crop
from repagen.errors import OneLineParser, UserError
from repagen.evaluation.reconstruction import reconstruct_command
from repagen.models.opening import load_model

SIDE, GAP = 32, 4


def parse(*words: str) -> argparse.Namespace:
    parser = OneLineParser(prog="repagen reconstruct")
    reconstruct_command.add_arguments(parser)
    return parser.parse_args(words)


def reconstruct(*words: str) -> str:
    return reconstruct_command.run(parse(*words))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    (folder / "süd").mkdir(parents=True)
    picture(70, 48).save(folder / "beach.png")
    picture(SIDE, SIDE, 1).save(folder / "exact.png")
    picture(20, 31, 2).save(folder / "süd" / "beach.png")
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(np.float64)


def test_images_of_any_size_are_cropped_reconstructed_and_measured(
    rae_folder: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = reconstruct("--autoencoder", str(rae_folder), "--images", str(photos), "--output", str(out))
    names = ["000000-beach.png", "000001-exact.png", "000002-beach.png"]
    assert sorted(path.name for path in (out / "reconstructions").iterdir()) == names
    assert "3 of 32 px, 2 cropped to a square, 1 enlarged" in text and "lpips: " in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert [image["source_size"] for image in metrics["images"]] == [[70, 48], [SIDE, SIDE], [20, 31]]
    for image, source in zip(metrics["images"], sorted(photos.rglob("*.png")), strict=True):
        assert image["source"] == str(source)
        original = np.asarray(center_crop(Image.open(source).convert("RGB"), SIDE)).astype(np.float64)
        alone, pair = (pixels(out / kind / image["file"]) for kind in ("reconstructions", "pairs"))
        np.testing.assert_array_equal(pair[:, :SIDE], original)
        np.testing.assert_array_equal(pair[:, SIDE + GAP :], alone)
        assert image["psnr"] == pytest.approx(-10 * np.log10(np.mean((original - alone) ** 2) / 255**2), abs=1e-3)
    assert metrics["metrics"]["psnr"] == pytest.approx(np.mean([image["psnr"] for image in metrics["images"]]))
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (4 * SIDE + 3 * GAP, 2 * SIDE + GAP)


def test_a_reconstruction_is_that_of_the_autoencoder(rae_folder: Path, photos: Path, tmp_path: Path) -> None:
    reconstruct(
        "--autoencoder", str(rae_folder), "--images", str(photos / "exact.png"), "--output", str(tmp_path / "out")
    )
    autoencoder = load_model(str(rae_folder), "model").eval()
    image = torch.from_numpy(pixels(photos / "exact.png")).float().permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = autoencoder.decode(autoencoder.encode(image).latent).sample.clamp(0, 1) * 255
    found = pixels(tmp_path / "out/reconstructions/000000-exact.png")
    assert np.abs(found - expected[0].permute(1, 2, 0).numpy()).max() <= 0.51


def test_an_image_says_how_it_came_about_and_the_command_makes_it_again(
    pipeline_folder: Path, photos: Path, tmp_path: Path
) -> None:
    words = ["--autoencoder", str(pipeline_folder), "--images", str(photos), "--metrics", "psnr"]
    reconstruct(*words, "--output", str(tmp_path / "a"))
    with Image.open(tmp_path / "a/pairs/000000-beach.png") as image:
        facts = json.loads(image.info["repagen"])
        assert image.info["Description"].startswith(f"original and reconstruction of {photos}/beach.png: PSNR ")
    assert (facts["kind"], facts["image_size"], facts["crop"]) == ("original and reconstruction", 16, "center")
    assert facts["autoencoder"]["class"] == "RepresentationAutoencoder" and len(facts["autoencoder"]["sha256"]) == 64
    again = shlex.split(facts["command"])
    assert again[:2] == ["repagen", "reconstruct"]
    reconstruct(*again[2:], "--output", str(tmp_path / "b"))
    first, second = (
        {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in (tmp_path / out).rglob("*.png")}
        for out in "ab"
    )
    assert len(first) == 7 and first == second


def test_an_interrupted_command_continues(
    rae_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(40, 40, 3).save(photos / "zoo.png")
    (photos / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    words = ["--autoencoder", str(rae_folder), "--images", str(photos), "--batch-size", "2", "--output", str(out)]
    text = reconstruct(*words)
    whole = {path: path.read_bytes() for path in out.rglob("*.*")}
    (out / "grid.png").unlink()
    (out / "metrics.json").unlink()
    (out / "pairs/000004-zoo.png").unlink()
    (out / "pairs/.tmp-1-x").write_bytes(b"half")
    made: list[int] = []
    real = reconstruct_command.reconstruct
    monkeypatch.setattr(reconstruct_command, "reconstruct", lambda *given: made.append(len(given[1])) or real(*given))
    assert reconstruct(*words) == text and made == [1]
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == whole
    picture(40, 40, 4).save(photos / "zoo.png")
    reconstruct(*words)
    assert made == [1, 1] and (out / "pairs/000004-zoo.png").read_bytes() != whole[out / "pairs/000004-zoo.png"]
    with pytest.raises(UserError, match=r"made with other values of command; name a new folder, or repeat"):
        reconstruct(*words, "--batch-size", "3")


def test_broken_images_are_named_and_the_others_made(rae_folder: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "film.gif").write_bytes(b"GIF89a")
    (photos / "half.png").write_bytes((photos / "exact.png").read_bytes()[:900])
    notes = tmp_path / "notes.txt"
    notes.write_text("not an image")
    text = reconstruct(
        "--autoencoder", str(rae_folder), "--images", str(photos), str(notes), "--output", str(tmp_path / "out")
    )
    assert "4 left out: " in text and "broken.jpg (not a PNG, JPEG, WEBP, BMP image)" in text
    broken = json.loads((tmp_path / "out/metrics.json").read_text())["broken"]
    assert sorted(Path(image["source"]).name for image in broken) == [
        "broken.jpg", "film.gif", "half.png", "notes.txt",
    ]  # fmt: skip
    assert len(list((tmp_path / "out/pairs").iterdir())) == 3


def test_a_huge_image_is_named(
    rae_folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("repagen.data.images.MAX_PIXELS", 2000)
    text = reconstruct("--autoencoder", str(rae_folder), "--images", str(photos), "--output", str(tmp_path / "out"))
    assert "1 left out: " in text and "beach.png (70x48 is more than 2000 pixels)" in text


def test_a_dataset_in_place_of_files(rae_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture(40, 36).save(tmp_path / "images/a.png")
    data = ["data.kind=folder", f"data.path={tmp_path / 'images'}", f"data.image_size={SIDE}"]
    text = reconstruct(*data, "--autoencoder", str(rae_folder), "--output", str(tmp_path / "out"))
    assert "1 of 32 px" in text and (tmp_path / "out/pairs/000000.png").is_file()


def test_an_autoencoder_of_many_sides_takes_the_one_asked_for(photos: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, latent_channels=2, down_block_types=(
        "DownEncoderBlock2D", "DownEncoderBlock2D"), up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    ).save_pretrained(tmp_path / "models" / "inner")  # fmt: skip
    words = ["--autoencoder", str(tmp_path / "models"), "--subfolder", "inner", "--images", str(photos)]
    assert "3 of 48 px" in reconstruct(*words, "--image-size", "48", "--output", str(tmp_path / "out"))
    with pytest.raises(UserError, match="--image-size: 47 px is no positive multiple of the autoencoder's 2 px"):
        reconstruct(*words, "--image-size", "47", "--output", str(tmp_path / "other"))


def test_mistakes_are_one_line(rae_folder: Path, encoder_folder: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"nothing")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{")
    rae, images, out = ["--autoencoder", str(rae_folder)], ["--images", str(photos)], str(tmp_path / "out")
    for words, message in (
        ([*rae], "give either --images PATH ... or a dataset"),
        (["data.kind=digits", *rae, *images], "give either --images PATH ... or a dataset"),
        ([*rae, "--images", str(tmp_path / "none")], "none: no such file or folder"),
        ([*rae, "--images", str(tmp_path / "empty")], "empty: no images in that folder; looked for .bmp"),
        ([*rae, "--images", str(tmp_path / "bad")], "none of the 1 images can be read: "),
        ([*rae, *images, "--image-size", "64"], "--image-size: 64 px, but the autoencoder is for images of 32 px"),
        ([*rae, "data.kind=digits", "data.image_size=64"], "data.image_size: 64 px, but the autoencoder is for"),
        ([*rae, "data.kind=digits", "--image-size", "32"], "say data.image_size=32 here"),
        ([*rae, *images, "--metrics", "lpips"], "LPIPS trunk"),
        ([*rae, *images, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ([*rae, *images, "--revision", "v1"], "is a folder here, which has no revisions; leave it out"),
        (["--autoencoder", "missing", *images], "--autoencoder: no such folder: missing"),
        (["--autoencoder", str(tmp_path / "damaged"), *images], "damaged/config.json: it cannot be read as JSON"),
        (["--autoencoder", str(encoder_folder), *images], "holds no autoencoder: Dinov2Model is none of"),
    ):
        with pytest.raises(UserError) as caught:
            reconstruct(*words, "--output", out)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"holds beach\.png, which is not of this command; name a new folder"):
        reconstruct(*rae, *images, "--output", str(photos))

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.data import DataConfig, load_digits
from repagen.errors import UserError
from repagen.evaluation import FolderImages, NpzImages, TensorImages, open_images
from repagen.evaluation.samples import Unreadable, dataset_images, to_uint8


def test_rounding_to_uint8() -> None:
    levels = torch.arange(256) / 255
    assert to_uint8(levels).tolist() == list(range(256))
    assert to_uint8(torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 1.7])).tolist() == [0, 0, 1, 255]
    assert to_uint8(torch.tensor([-0.5, 0.4 / 255, 1.6 / 255, 1.7]), "truncate").tolist() == [0, 0, 1, 255]


def test_a_folder_is_read_in_order_of_paths_with_its_subfolders(
    tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    pictures = random_pictures(4, seed=0)
    write_pictures(tmp_path / "b", pictures[2:])
    write_pictures(tmp_path / "a", pictures[:2])
    (tmp_path / "notes.txt").write_text("not a picture")
    source = FolderImages(tmp_path)
    loaded = torch.stack(source.load(range(4)))
    assert torch.equal(loaded, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert [source.describe(index) for index in (0, 3)] == ["a/00000.png", "b/00001.png"]


def test_unreadable_files_are_named_with_the_reason(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> None:
    write_pictures(tmp_path, random_pictures(2, seed=0))
    whole = (tmp_path / "00000.png").read_bytes()
    (tmp_path / "00000.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "00001.png").write_text("no picture at all")
    truncated, foreign = FolderImages(tmp_path).load([0, 1])
    assert isinstance(truncated, Unreadable) and truncated.name == "00000.png" and "truncated" in truncated.reason
    assert isinstance(foreign, Unreadable) and foreign.name == "00001.png"


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    write_pictures(folder, random_pictures(1, seed=0))
    (folder / "00000.png").rename(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png"))
    source = FolderImages(folder)
    assert source.describe(0) == r"\xff\xfe.png" and len(source.state([0])) == 64
    assert json.loads(json.dumps(source.protocol).encode())["path"] == rf"{tmp_path}/\xe9"
    [pixels] = source.load([0])
    assert isinstance(pixels, torch.Tensor)
    dataset = open_images(["data.kind=folder", f"data.path={tmp_path}", "data.image_size=16"])
    assert dataset.describe(0) == rf"{tmp_path}/\xe9/\xff\xfe.png"


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> None:
    write_pictures(tmp_path, random_pictures(1, seed=0))
    (tmp_path / "9.png").symlink_to("nowhere.png")
    source = FolderImages(tmp_path)
    state = source.state([1])
    _, missing = source.load([0, 1])
    assert missing == Unreadable("9.png", "No such file or directory")
    (tmp_path / "nowhere.png").write_bytes(b"a picture, perhaps")
    assert source.state([1]) != state


def test_linked_folders_are_followed_and_loops_are_not(
    tmp_path: Path, random_pictures: Any, write_pictures: Any
) -> None:
    write_pictures(tmp_path / "elsewhere", random_pictures(2, seed=0))
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "subset")
    source = FolderImages(tmp_path / "subset")
    assert [source.describe(index) for index in range(len(source))] == ["a/00000.png", "a/00001.png"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_its_images_in_any_order(tmp_path: Path, save: Any, random_pictures: Any) -> None:
    pictures = random_pictures(7, seed=3)
    save(tmp_path / "samples.npz", arr_0=pictures, arr_1=np.arange(7))
    source = NpzImages(tmp_path / "samples.npz")
    expected = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert len(source) == 7
    assert torch.equal(torch.stack(source.load([0, 1, 5])), expected[[0, 1, 5]])
    assert torch.equal(torch.stack(source.load([2])), expected[[2]])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "must be uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"must be uint8 \(N, H, W, 3\), got uint8 \(2, 3, 8, 8\)"),
        (np.array([{}], dtype=object), "must be uint8"),
    ],
)
def test_an_npz_of_another_layout_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "samples.npz", arr_0=array)
    with pytest.raises(UserError, match=message):
        NpzImages(tmp_path / "samples.npz")


def test_a_damaged_npz_is_named(tmp_path: Path, random_pictures: Any) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=random_pictures(5, seed=0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.npz: the file is damaged"):
        NpzImages(path).load(range(5))
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match="not an npz file"):
        NpzImages(path)


def test_the_bundled_digits_are_opened_by_their_settings() -> None:
    source = open_images(["data.kind=digits", "data.subset=validation", "data.image_size=32"])
    image = source.load([0])[0]
    assert len(source) == len(load_digits("validation")[0])
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    assert source.protocol == {
        "kind": "digits",
        "subset": "validation",
        "image_size": 32,
        "crop": "center",
    }


def test_a_folder_is_cropped_when_it_is_opened_as_a_dataset(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 40, 3), 200, np.uint8)).save(tmp_path / "wide.png")
    source = open_images(["data.kind=folder", f"data.path={tmp_path}", "data.image_size=10"])
    assert torch.equal(source.load([0])[0], torch.full((3, 10, 10), 200, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.kind=digits", "data.imagesize=3"],
            "data.imagesize=3: not a known setting; allowed: .*data.image_size",
        ),
        (["data.kind=digit"], "expected one of"),
        (["data.kind=digits", "data.max_bad_images=2"], "is for training; say here --max-bad 2"),
        (["data.kind=digits", "samples"], "give one path"),
        (["missing"], "no such folder of images: missing"),
        (["missing.npz"], "no such file: missing.npz"),
    ],
)
def test_wrong_words_are_explained(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_images(words)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images found"):
        FolderImages(tmp_path)


def test_images_in_memory_are_checked() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    source = TensorImages(images, "samples")
    assert torch.equal(torch.stack(source.load([1, 0])), images.flip(0))
    assert source.describe(1) == "samples[1]"
    assert source.state([0]) != TensorImages(images + 1).state([0])
    with pytest.raises(
        UserError, match=r"samples: images must be uint8 \(N, 3, H, W\), got torch.float32 \(2, 3, 4, 4\)"
    ):
        TensorImages(images.float(), "samples")


def test_image_files_that_are_not_read_are_reported(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> None:
    write_pictures(tmp_path, random_pictures(1, seed=0))
    Image.new("RGB", (16, 16)).save(tmp_path / "animated.gif")
    _, gif = FolderImages(tmp_path).load([0, 1])
    assert isinstance(gif, Unreadable) and gif.name == "animated.gif" and "not a PNG" in gif.reason


def test_a_changed_file_is_another_state(tmp_path: Path, random_pictures: Any, write_pictures: Any) -> None:
    write_pictures(tmp_path, random_pictures(2, seed=0))
    state, other = FolderImages(tmp_path).state([1]), FolderImages(tmp_path).state([0])
    assert FolderImages(tmp_path).state([1]) == state
    (tmp_path / "00001.png").write_bytes((tmp_path / "00000.png").read_bytes())
    assert FolderImages(tmp_path).state([1]) != state
    assert FolderImages(tmp_path).state([0]) == other


RULES = {  # what an image file is => the pixel it shows
    "16-bit grey": (Image.fromarray(np.full((4, 4), 257 * 100, np.uint16)), "png", (100, 100, 100)),
    "grey": (Image.new("L", (4, 4), 7), "png", (7, 7, 7)),
    "transparent": (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "png", (255, 255, 255)),
    "half transparent": (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "png", (204, 204, 204)),
    "palette": (Image.new("RGB", (4, 4), (1, 2, 3)).quantize(), "png", (1, 2, 3)),
    "CMYK": (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "jpg", (0, 0, 0)),
}


@pytest.mark.parametrize("name", RULES)
def test_every_kind_of_picture_has_its_rule(tmp_path: Path, name: str) -> None:
    picture, suffix, expected = RULES[name]
    picture.save(tmp_path / f"picture.{suffix}")
    [pixels] = FolderImages(tmp_path).load([0])
    assert isinstance(pixels, torch.Tensor)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.uint8
    assert pixels[:, 0, 0].tolist() == pytest.approx(expected, abs=2)


def test_of_16_bit_colour_the_high_byte_is_kept(tmp_path: Path) -> None:
    """Pillow does not write such a file, so here are its chunks; 25855 / 257 is nearer to 101."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    row = b"\0" + struct.pack(">HHH", 25855, 257 * 7, 65535)
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)), chunk(b"IDAT", zlib.compress(row))
    (tmp_path / "colour.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b""))
    [pixels] = FolderImages(tmp_path).load([0])
    assert pixels.flatten().tolist() == [100, 7, 255]  # type: ignore[union-attr]


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.new("RGB", (4, 2)).save(tmp_path / "photo.jpg", exif=exif)
    [pixels] = FolderImages(tmp_path).load([0])
    assert pixels.shape == (3, 4, 2)  # type: ignore[union-attr]


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    [pixels] = FolderImages(tmp_path).load([0])
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]  # type: ignore[union-attr]


def test_the_origin_of_a_dataset_is_its_state(tmp_path: Path) -> None:
    """Features of a killed evaluation are not those of images that were written since."""
    path = tmp_path / "0.bmp"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path)
    source = dataset_images(DataConfig(path=str(tmp_path), image_size=4))
    before, fingerprint = source.origin(), source.dataset.fingerprint()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(path)
    assert source.origin() != before and source.dataset.fingerprint() == fingerprint

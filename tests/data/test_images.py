"""Decoding by written rules: every hostile file is decoded as the rules say, or refused with a reason."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repagen.data.images import BadImageError, center_crop, decode_image, random_crop, to_tensor


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth picture, different at each corner, so that JPEG keeps it and every rotation shows."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), np.full_like(x, 60)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bit_depth: int, color_type: int, data: bytes) -> bytes:
    """A PNG written by hand, so that headers can lie."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def pixels(source: bytes | Path) -> np.ndarray:
    return np.asarray(decode_image(source)).astype(int)


@pytest.mark.parametrize(("kind", "tolerance"), [("PNG", 0), ("BMP", 0), ("JPEG", 12), ("WEBP", 24)])
def test_the_four_formats_are_read(kind: str, tolerance: int) -> None:
    assert np.abs(pixels(encoded(picture(), kind)) - np.asarray(picture()).astype(int)).max() <= tolerance


def test_the_extension_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(picture(), "PNG"))
    assert np.array_equal(pixels(path), np.asarray(picture()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.asarray(picture())
    stored = {  # what a camera held in each way writes
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(pixels(content), upright)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))  # a colour hidden under full transparency
    image.putpixel((1, 0), (100, 100, 100, 255))
    content = encoded(image.convert("P") if mode == "PA" else image.convert(mode), "PNG")
    assert pixels(content)[0].tolist() == [[255] * 3, [100] * 3]


def test_half_transparency_mixes_with_white() -> None:
    assert pixels(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))[0, 0].tolist() == [127] * 3


def test_transparent_colour_of_a_plain_png_is_white() -> None:
    content = encoded(Image.new("RGB", (2, 2), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    assert (pixels(content) == 255).all()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.array([[0, 257 * 100, 257 * 200 + 100, 65535]], dtype=np.uint16)
    rows = b"\0" + levels.astype(">u2").tobytes()
    assert pixels(png(4, 1, 16, 0, rows))[0, :, 0].tolist() == [0, 100, 200, 255]


def test_16_bit_colour_keeps_its_levels() -> None:
    rows = b"\0" + np.array([257 * 10, 257 * 128, 65535], dtype=">u2").tobytes()
    assert pixels(png(1, 1, 16, 2, rows))[0, 0].tolist() == [10, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (16, 16), "white").convert(mode)
    content = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert (pixels(content) >= 254).all()


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert pixels(content)[4, 4].tolist() == [255, 0, 0]


PNG = encoded(picture(), "PNG")
JPEG = encoded(picture(), "JPEG")
DAMAGED = {
    "empty": b"",
    "text": b"hello, I am an image",
    "zeros": bytes(1000),
    "png signature alone": PNG[:8],
    "png header alone": PNG[:33],
    "truncated png": PNG[: len(PNG) // 2],
    "png without its end": PNG[:-40],
    "png bit flip": PNG[:60] + bytes([PNG[60] ^ 0x10]) + PNG[61:],
    "jpeg start alone": JPEG[:2],
    "jpeg tables alone": JPEG[:200],
    "truncated jpeg": JPEG[: 2 * len(JPEG) // 3],
    "truncated webp": encoded(picture(), "WEBP")[:60],
    "truncated bmp": encoded(picture(), "BMP")[:1000],
    "bomb of 60000x60000": png(60000, 60000, 8, 2, b"\0"),
    "bomb of 9000x9000": png(9000, 9000, 8, 2, b"\0"),
    "zero width": png(0, 10, 8, 2, b"\0"),
    "bad bit depth": png(4, 4, 3, 2, b"\0"),
    "too few rows": png(40, 40, 8, 2, bytes(100)),
    "gif": encoded(picture().convert("P"), "GIF"),
    "tiff": encoded(picture(), "TIFF"),
    "ico": encoded(picture(32, 32), "ICO"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_and_foreign_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(BadImageError) as refusal:
        decode_image(path)
    assert str(refusal.value)


def test_a_bomb_costs_no_memory() -> None:
    tracemalloc.start()
    with pytest.raises(BadImageError, match="pixels"):
        decode_image(png(9000, 9000, 8, 2, b"\0"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


@pytest.mark.parametrize("obstacle", ["missing", "folder", "link loop", "pipe", "dangling link"])
def test_what_is_no_regular_file_is_refused(obstacle: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    if obstacle == "folder":
        path.mkdir()
    elif obstacle == "link loop":
        path.symlink_to(path)
    elif obstacle == "dangling link":
        path.symlink_to(tmp_path / "nowhere.png")
    elif obstacle == "pipe":
        os.mkfifo(path)
    with pytest.raises(BadImageError):
        decode_image(path)


def test_a_link_to_an_image_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "b.png"), np.asarray(picture()))


def reference_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's rule in its own order: halve, scale, round, cut from the array."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    array = np.array(image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(16, 16), (33, 64), (64, 31), (100, 257), (500, 333), (15, 17), (1, 1), (1, 40)])
def test_center_crop_is_adms(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert np.array_equal(np.asarray(center_crop(image, 16)), reference_center_crop(image, 16))


def test_an_elongated_image_is_refused_before_it_fills_memory() -> None:
    with pytest.raises(BadImageError, match="elongated"):
        center_crop(Image.new("RGB", (1, 20_000)), 256)


def test_random_crop_reaches_every_offset_and_only_cuts() -> None:
    image = picture(24, 16)  # the short side is 16 already: no resampling
    seen = set()
    for seed in range(200):
        crop = np.asarray(random_crop(image, 8, 16, torch.Generator().manual_seed(seed)))
        left, top = round(int(crop[0, 0, 0]) * 23 / 255), round(int(crop[0, 0, 1]) * 15 / 255)
        assert np.array_equal(crop, np.asarray(image)[top : top + 8, left : left + 8])
        seen.add((left, top))
    assert {left for left, _ in seen} == set(range(17)) and {top for _, top in seen} == set(range(9))


def test_random_crop_is_central_without_a_generator() -> None:
    assert np.array_equal(
        np.asarray(random_crop(picture(24, 16), 8, 16, None)), np.asarray(picture(24, 16))[4:12, 8:16]
    )


def test_tensor_is_channels_first_in_unit_range() -> None:
    tensor = to_tensor(picture())
    assert tensor.shape == (3, 30, 40) and tensor.dtype == torch.float32
    assert torch.equal(tensor[:, 0, 39], torch.tensor([1.0, 0.0, 60 / 255]))

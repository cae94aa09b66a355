"""From an image file to a square picture: decoding by written rules, ADM's centre crop, random crop, flip.

Rules of decoding. PNG, JPEG, WebP and BMP only, told by content and not by name. The EXIF orientation is applied; of
an animation the first frame is taken; 16-bit grey is rounded to 8 bits, of 16-bit colour Pillow keeps the high byte;
palettes, CMYK and grey become RGB; transparent pixels are composited on white, as browsers show them; colour profiles
are ignored. Whatever is not a whole, regular image file of at most 2^26 pixels raises `BadImageError` with the reason.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
# Image files that are not read: a folder that holds them is reported rather than thinned in silence.
UNREAD_EXTENSIONS = frozenset(
    {".gif", ".tif", ".tiff", ".svg", ".eps", ".ps", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ico", ".psd", ".tga"}
)
MAX_PIXELS = 2**26
_ORIENTATION = 0x0112  # EXIF


class BadImageError(Exception):
    """An image that cannot be used; the message is the reason, without the name of the image."""


def decode_image(source: Path | bytes) -> Image.Image:
    """Decode an image file, or the bytes of one, to 8-bit RGB by the rules at the top of this module.

    Raises:
        BadImageError: the file is missing, unreadable, not a regular file, empty, truncated, damaged, of a format
            that is not read, or larger than `MAX_PIXELS`.
    """
    with _opened(source) as image:
        if image.width * image.height > MAX_PIXELS:
            raise BadImageError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def read_size(source: Path | bytes | IO[bytes]) -> tuple[int, int]:
    """Return the height and width that `decode_image` gives, from the head of a file alone.

    The orientation of a PNG counts only where it stands before the pixels.

    Raises:
        BadImageError: the file is missing, unreadable, no regular file, empty, or of a format that is not read.
    """
    with _opened(source) as image:
        oriented = image.format != "PNG" or "exif" in image.info  # else Pillow decodes the pixels to look behind them
        turned = oriented and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


@contextmanager
def _opened(source: Path | bytes | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image without decoding it; whatever is wrong with it, here or later, is a `BadImageError`."""
    try:
        with _stream(source) as stream, warnings.catch_warnings():
            # Pillow warns about damaged metadata and large headers; both are decided by the caller.
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=FORMATS) as image:
                yield image
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not a {', '.join(FORMATS)} image") from None
    # A damaged file surfaces in Pillow as almost any exception (OSError, SyntaxError, ValueError, struct.error ...).
    except Exception as error:
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _stream(source: Path | bytes | IO[bytes]) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, Path):
        return source
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would hang
            raise BadImageError("not a regular file")
        if status.st_size == 0:
            raise BadImageError("the file is empty")
        return source.open("rb")
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to 255
        grey = np.asarray(image, dtype=np.float64) / 257.0
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:  # convert("RGB") would show the colours hidden under the transparency
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Return the central part of an RGB image as ADM prepares ImageNet, of `size` (the side, or height and width).

    The picture is halved by box filters while it is at least twice as large, then resized bicubically to cover `size`
    (a square by its short side), then cropped (Dhariwal & Nichol 2021, the preprocessing behind the published ImageNet
    statistics).
    """
    height, width = (size, size) if isinstance(size, int) else size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _cut(_resize_to_cover(image, height, width), height, width, None)


def random_crop(
    image: Image.Image, size: int | tuple[int, int], resize_px: float, generator: torch.Generator | None
) -> Image.Image:
    """Resize an RGB image bicubically to a short side of `resize_px`, then cut a random size x size square.

    RAE trains its decoder so (384 => 256, 768 => 512). Without a generator the central square is cut. For a `size` of
    height and width `resize_px` belongs to the square of equal area.
    """
    height, width = (size, size) if isinstance(size, int) else size
    share = resize_px / math.sqrt(height * width)
    image = _resize_to_cover(image, round(height * share), round(width * share))
    return _cut(image, height, width, generator)


def _cut(image: Image.Image, height: int, width: int, generator: torch.Generator | None) -> Image.Image:
    room = (image.width - width, image.height - height)
    if generator is None:
        left, top = (extent // 2 for extent in room)
    else:
        left, top = (int(torch.randint(extent + 1, (), generator=generator)) for extent in room)
    return image.crop((left, top, left + width, top + height))


def _resize_to_cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize so that one side fits and the other is no shorter."""
    scale = max(width / image.width, height / image.height)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise BadImageError(f"{image.width}x{image.height} is too elongated for a crop of {width}x{height} pixels")
    return image.resize(size, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an 8-bit RGB image as a (3, H, W) float32 tensor in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous().float().div_(255.0)

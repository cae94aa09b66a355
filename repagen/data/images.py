"""From an image file to a square picture: decoding by written rules, ADM's centre crop, random crop, flip.

Rules of decoding. PNG, JPEG, WebP and BMP only, told by content and not by name. The EXIF orientation is applied; of
an animation the first frame is taken; 16-bit grey is rounded to 8 bits, of 16-bit colour Pillow keeps the high byte;
palettes, CMYK and grey become RGB; transparent pixels are composited on white, as browsers show them; colour profiles
are ignored. Whatever is not a whole, regular image file of at most 2^26 pixels raises `BadImageError` with the reason.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

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


class BadImageError(Exception):
    """An image that cannot be used; the message is the reason, without the name of the image."""


def decode_image(source: Path | bytes) -> Image.Image:
    """Decode an image file, or the bytes of one, to 8-bit RGB by the rules at the top of this module.

    Raises:
        BadImageError: the file is missing, unreadable, not a regular file, empty, truncated, damaged, of a format
            that is not read, or larger than `MAX_PIXELS`.
    """
    try:
        stream = io.BytesIO(_read_file(source) if isinstance(source, Path) else source)
        # Pillow warns about damaged metadata and large headers; both are decided below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImageError(f"not a {', '.join(FORMATS)} image") from None
    # A damaged file surfaces in Pillow as almost any exception (OSError, SyntaxError, ValueError, struct.error ...).
    except Exception as error:
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _read_file(path: Path) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would hang
            raise BadImageError("not a regular file")
        if status.st_size == 0:
            raise BadImageError("the file is empty")
        return path.read_bytes()
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


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an RGB image, size x size, as ADM prepares ImageNet.

    The picture is halved by box filters while its short side is at least twice `size`, then resized bicubically to a
    short side of `size`, then cropped (Dhariwal & Nichol 2021, the preprocessing behind the published ImageNet
    statistics).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = _resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, resize_px: int, generator: torch.Generator | None) -> Image.Image:
    """Resize an RGB image bicubically to a short side of `resize_px`, then cut a random size x size square.

    RAE trains its decoder so (384 => 256, 768 => 512). Without a generator the central square is cut.
    """
    image = _resize_short_side(image, resize_px)
    room = (image.width - size, image.height - size)
    if generator is None:
        left, top = (extent // 2 for extent in room)
    else:
        left, top = (int(torch.randint(extent + 1, (), generator=generator)) for extent in room)
    return image.crop((left, top, left + size, top + size))


def _resize_short_side(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (round(extent * scale) for extent in image.size)
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{image.width}x{image.height} is too elongated for a crop of {size} pixels")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an 8-bit RGB image as a (3, H, W) float32 tensor in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous().float().div_(255.0)

"""Drawing scenes with antialiased edges, at any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral

import numpy as np

from repagen.data.shapes.scenes import BACKGROUNDS, COLOURS, SIZES, UNITS, Scene, Shape
from repagen.errors import UserError

SUPERSAMPLING = 8
"""Points along each side of a pixel whose mean is the pixel."""

_INSIDE: dict[Shape, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.9,
    "triangle": lambda x, y: (y <= 0.85) & (abs(x) <= (y + 0.95) / 1.8),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.25),
}
"""Whether points lie within a shape of radius 1; x to the right, y down."""


def coverage(shape: Shape, centre: tuple[float, float], radius: float, height: int, width: int) -> np.ndarray:
    """Return how much of each pixel a shape covers (H, W) float64 in [0, 1].

    Args:
        shape: by name.
        centre: (x, y) in pixels; whole numbers are corners of pixels.
        radius: in pixels.
        height, width: of the picture, in pixels.
    """
    left, right = _span(centre[0], radius, width)
    top, bottom = _span(centre[1], radius, height)
    y = ((np.arange(top * SUPERSAMPLING, bottom * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - centre[1]) / radius
    x = ((np.arange(left * SUPERSAMPLING, right * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - centre[0]) / radius
    inside = _INSIDE[shape](x[None], y[:, None])
    covered = np.zeros((height, width))
    covered[top:bottom, left:right] = inside.reshape(bottom - top, SUPERSAMPLING, -1, SUPERSAMPLING).mean((1, 3))
    return covered


def _span(middle: float, radius: float, side: int) -> tuple[int, int]:
    """Return the first pixel that a circle reaches, and the first behind it."""
    return max(0, math.floor(middle - radius)), min(side, math.ceil(middle + radius))


def picture_sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of one side or of both.

    Raises:
        UserError: a side is no whole number of pixels, or too short to tell the shapes apart.
    """
    height, width = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    if not (isinstance(height, Integral) and isinstance(width, Integral)):
        raise UserError(
            f"image_size: {image_size!r} given; the shapes allow a whole number of pixels, or two in a tuple"
        )
    if min(height, width) < 24:
        raise UserError(f"image_size: {height}x{width} given; the shapes allow 24 pixels a side or more, such as 32")
    return height, width


def draw_scene(scene: Scene, image_size: int | tuple[int, int] = UNITS) -> np.ndarray:
    """Draw a scene, 8x8 points a pixel.

    Args:
        scene: what to draw.
        image_size: side, or (height, width), in pixels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the picture is too small for the shapes.
    """
    height, width = picture_sides(image_size)
    unit = min(height, width) / UNITS
    picture = np.empty((height, width, 3))
    picture[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        right, down = item.offset
        centre = (item.column * 2 + 1) * width / 4 + right * unit, (item.row * 2 + 1) * height / 4 + down * unit
        covered = coverage(item.shape, centre, SIZES[item.size] / 2 * unit, height, width)[..., None]
        picture += covered * (np.array(COLOURS[item.colour]) - picture)
    return np.rint(picture).astype(np.uint8)

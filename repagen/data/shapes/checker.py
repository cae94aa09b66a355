"""Reading a picture of shapes, and judging it against what a prompt asks for.

The picture alone is read: what differs from the background falls into connected parts; each part's colour is the
palette's nearest, its shape that of the drawn template with the greatest overlap, over all shapes, sizes and places
within a pixel. What fits no template, or no colour, is an unknown object: it counts, and is never right. A shape that
has no template is known as one that it overlaps enough, as a diamond is as a circle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TypeVar

import numpy as np
import torch

from repagen.data.shapes.drawing import coverage, picture_sides
from repagen.data.shapes.prompts import ObjectRequest, Relation, ScenePrompt
from repagen.data.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    NEW_SHAPES,
    QUADRANTS,
    SHAPES,
    SIZES,
    UNITS,
    Background,
    Colour,
    Quadrant,
    Scene,
    Shape,
    Size,
)
from repagen.errors import UserError

MIN_OVERLAP = 0.7
"""Overlap (sum of minima over sum of maxima) with a template below which a part has no shape. A small triangle
blurred by 0.8 pixels has 0.73, a diamond with a circle 0.83."""
_MIN_COVERAGE = 0.4
_MIN_AREA = 12.0  # square units; the smallest object has 29
_MAX_COLOUR_DISTANCE = 80.0  # 8-bit RGB; the two nearest colours of the palette are 142 apart
_MIN_DIFFERENCE = 60.0  # 8-bit RGB; three times the noise that is forgiven
_SCALES = (0.85, 0.92, 1.0, 1.08)
_PHASES = (-0.5, -0.25, 0.0, 0.25)
_FINEST_UNIT = 2.0
_MAX_CONSIDERED = 6  # objects more than asked for that are tried as partners: with more, the count is wrong anyway
_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True)
class FoundObject:
    """An object as it was read.

    Attributes:
        shape, colour: None when nothing known fits.
        size: nearest of the two, by area.
        quadrant: of its centre.
        centre: (x, y) as fractions of width and height.
        overlap: with the best template, in [0, 1].
    """

    shape: Shape | None
    colour: Colour | None
    size: Size
    quadrant: Quadrant
    centre: tuple[float, float]
    overlap: float


@dataclass(frozen=True)
class FoundScene:
    """What a picture shows; `background` is None when it is no colour of the palette."""

    objects: tuple[FoundObject, ...]
    background: Background | None


@dataclass(frozen=True)
class SceneVerdict:
    """Which parts of a prompt hold in a picture; what was not asked for holds.

    Attributes:
        object: every shape asked for is there.
        colour, size, position: of every object asked for; a relation is a position.
        background: its colour.
        count: as many objects as asked for.
    """

    object: bool
    colour: bool
    size: bool
    position: bool
    background: bool
    count: bool

    @property
    def kind(self) -> bool:
        """Whether every object has shape and colour at once, and there are no others."""
        return self.object and self.colour and self.count

    @property
    def right(self) -> bool:
        """Whether everything holds."""
        return self.kind and self.size and self.position and self.background


def check_scene(picture: np.ndarray | torch.Tensor, scene: Scene) -> SceneVerdict:
    """Judge a picture against everything that a scene shows; see `check_picture`."""
    return check_picture(picture, scene.prompts()[0])


def check_picture(picture: np.ndarray | torch.Tensor, prompt: ScenePrompt) -> SceneVerdict:
    """Judge a picture (H, W, 3) uint8, or (3, H, W) float in [0, 1], against a prompt.

    Raises:
        UserError: the picture is of another form, or too small.
    """
    return judge(read_picture(picture), prompt)


def judge(found: FoundScene, prompt: ScenePrompt) -> SceneVerdict:
    """Judge what a picture shows against a prompt.

    Objects asked for are paired with objects found such that most of them are entirely right, then such that most have
    their shape and colour, wherever they are.
    """
    wanted = prompt.objects
    pool: list[FoundObject | None] = [*found.objects, *[None] * len(wanted)]
    judged = [
        (
            [_judge(item, request) for item, request in zip(order, wanted, strict=True)],
            _stands(order, prompt.relation),
        )
        for order in itertools.permutations(pool[: len(wanted) + _MAX_CONSIDERED], len(wanted))
    ]
    objects, related = max(judged, key=lambda pairing: _agreement(*pairing))
    shape, colour, size, position = (all(column) for column in zip(*objects, strict=True))
    return SceneVerdict(
        object=shape,
        colour=colour,
        size=size,
        position=position and related,
        background=prompt.background in (None, found.background),
        count=len(found.objects) == len(wanted),
    )


def _agreement(objects: Sequence[tuple[bool, ...]], related: bool) -> tuple[int, int, int]:
    """How good a pairing is: what is entirely right, then objects of the right shape and colour, then everything."""
    entirely = sum(map(all, objects)) + related
    kinds = sum(all(judged[:2]) for judged in objects)
    return entirely, kinds, sum(map(sum, objects)) + related


def _judge(found: FoundObject | None, wanted: ObjectRequest) -> tuple[bool, bool, bool, bool]:
    if found is None:
        return False, False, False, False
    return (
        found.shape == wanted.shape,
        found.colour is not None and wanted.colour in (None, found.colour),
        wanted.size in (None, found.size),
        wanted.quadrant in (None, found.quadrant),
    )


def _stands(order: Sequence[FoundObject | None], relation: Relation | None) -> bool:
    if relation is None:
        return True
    first, second = order
    if first is None or second is None:
        return False
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (second.centre[axis] - first.centre[axis]) > 0.1


def read_picture(picture: np.ndarray | torch.Tensor) -> FoundScene:
    """Read which objects a picture shows.

    Args:
        picture: (H, W, 3) uint8, or (3, H, W) float in [0, 1].

    Raises:
        UserError: the picture is of another form, or too small.
    """
    pixels = _coarsened(_as_pixels(picture))
    height, width = pixels.shape[:2]
    unit = min(height, width) / UNITS
    frame = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(frame, 0)
    covered = _coverage_of_colours(pixels, ground)
    places = [_grown(part) for part in _large_parts(covered, _MIN_COVERAGE, unit)]
    parts = [np.where(place, covered, 0.0) for place in places]
    # Of no colour of the palette, which nobody asks for, but an object all the same.
    rest = np.linalg.norm(pixels - ground, axis=-1) > _MIN_DIFFERENCE
    rest &= ~np.any(places, axis=0)
    parts += [part.astype(float) for part in _large_parts(rest.astype(float), 0.0, unit)]
    return FoundScene(tuple(_read_part(pixels, part, unit) for part in parts), _nearest(ground, BACKGROUNDS))


def _as_pixels(picture: np.ndarray | torch.Tensor) -> np.ndarray:
    array = picture.detach().cpu().numpy() if isinstance(picture, torch.Tensor) else picture
    if not isinstance(array, np.ndarray):
        raise UserError(
            f"picture: a {type(picture).__name__} given; allowed: an array, as np.asarray makes, or a tensor"
        )
    if array.ndim == 3 and array.dtype == np.uint8 and array.shape[2] == 3:
        pixels = array.astype(np.float64)
    elif array.ndim == 3 and np.issubdtype(array.dtype, np.floating) and array.shape[0] == 3:
        pixels = array.transpose(1, 2, 0).astype(np.float64).clip(0, 1) * 255
    else:
        raise UserError(
            f"picture: {array.dtype} {array.shape} given; allowed: (H, W, 3) uint8, or (3, H, W) float in [0, 1]"
        )
    picture_sides(pixels.shape[:2])
    return pixels


def _coarsened(pixels: np.ndarray) -> np.ndarray:
    """Average blocks of pixels while more than 2 pixels a unit remain."""
    height, width = pixels.shape[:2]
    block = int(min(height, width) / (_FINEST_UNIT * UNITS))
    while block > 1 and (height % block or width % block):
        block -= 1
    if block <= 1:
        return pixels
    return pixels.reshape(height // block, block, width // block, block, 3).mean((1, 3))


def _coverage_of_colours(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Return how much of each pixel is object (H, W): its place between the background and the colour it fits best."""
    way = np.array(list(COLOURS.values())) - ground  # (K, 3)
    way = way[np.linalg.norm(way, axis=1) > _MAX_COLOUR_DISTANCE]  # the background's own colour shows no object
    offset = (pixels - ground)[..., None, :]
    share = ((offset * way).sum(-1) / (way**2).sum(-1)).clip(0, 1)
    miss = ((offset - share[..., None] * way) ** 2).sum(-1)
    return np.take_along_axis(share, miss.argmin(-1)[..., None], -1)[..., 0]


def _large_parts(covered: np.ndarray, least: float, unit: float) -> list[np.ndarray]:
    """Masks (H, W) of the connected parts that are covered by more than `least`, and large enough for an object."""
    labels = _connected_parts(covered > least)
    parts = [labels == label for label in range(1, labels.max() + 1)]
    return [part for part in parts if covered[part].sum() >= _MIN_AREA * unit**2]


def _connected_parts(mask: np.ndarray) -> np.ndarray:
    """Number the parts of a mask (H, W) that hang together by sides: 1, 2 ...; 0 outside."""
    labels = np.zeros(mask.shape, int)
    for start in zip(*mask.nonzero(), strict=True):
        if labels[start]:
            continue
        labels[start] = label = labels.max() + 1
        waiting = [start]
        while waiting:
            row, column = waiting.pop()
            for place in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                within = 0 <= place[0] < mask.shape[0] and 0 <= place[1] < mask.shape[1]
                if within and mask[place] and not labels[place]:
                    labels[place] = label
                    waiting.append(place)
    return labels


def _grown(part: np.ndarray) -> np.ndarray:
    """Add the pixels at the sides and corners of a part, where its faint edge lies."""
    padded = np.pad(part, 1)
    height, width = part.shape
    return np.any([padded[r : r + height, c : c + width] for r in range(3) for c in range(3)], axis=0)


def _read_part(pixels: np.ndarray, covered: np.ndarray, unit: float) -> FoundObject:
    height, width = covered.shape
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    total = covered.sum()
    y, x = float(covered.sum(1) @ rows / total), float(covered.sum(0) @ columns / total)
    shape, overlap, area = _best_template(covered, (x, y), unit)
    core = covered >= min(0.9, np.quantile(covered[covered > 0], 0.6))
    centre = x / width, y / height
    return FoundObject(
        shape=shape if overlap >= MIN_OVERLAP else None,
        colour=_nearest(np.median(pixels[core], 0), COLOURS),
        size=min(SIZES, key=lambda size: abs(np.log(total / unit**2 / area[size]))),
        quadrant=QUADRANTS[2 * (centre[1] >= 0.5) + (centre[0] >= 0.5)],
        centre=centre,
        overlap=overlap,
    )


def _nearest(colour: np.ndarray, palette: dict[_Name, tuple[int, int, int]]) -> _Name | None:
    distance = {name: float(np.linalg.norm(colour - np.array(entry))) for name, entry in palette.items()}
    best = min(distance, key=lambda name: distance[name])
    return best if distance[best] <= _MAX_COLOUR_DISTANCE else None


def _best_template(
    covered: np.ndarray, centroid: tuple[float, float], unit: float
) -> tuple[Shape, float, dict[Size, float]]:
    """Return the shape of the best template, its overlap, and that shape's area by size in square units."""
    templates, shapes = _templates(unit)
    side = templates.shape[-1]
    # The pixel with the centroid comes to lie in the middle pixel of the window.
    left, top = int(centroid[0]) - side // 2, int(centroid[1]) - side // 2
    padded = np.pad(covered, side)[top + side : top + 2 * side, left + side : left + 2 * side]
    inside = np.minimum(templates, padded).sum((1, 2))
    # What lies outside the window belongs to the union too.
    union = templates.sum((1, 2)) + covered.sum() - inside
    overlaps = inside / union
    best = int(overlaps.argmax())
    return shapes[best], float(overlaps[best]), _areas(shapes[best])


@lru_cache(maxsize=8)
def _templates(unit: float) -> tuple[np.ndarray, list[Shape]]:
    """Draw every shape in every size, its centroid at 16 places of a window's middle pixel: (T, S, S), and shapes."""
    side = 2 * int(np.ceil(max(SIZES.values()) * max(_SCALES) / 2 * unit) + 1) + 1
    drawn, shapes = [], []
    for shape, diameter, scale in itertools.product((*SHAPES, *NEW_SHAPES), SIZES.values(), _SCALES):
        radius = diameter * scale / 2 * unit
        down = _centroid_below_centre(shape) * radius
        for right_phase, down_phase in itertools.product(_PHASES, _PHASES):
            middle = side / 2 + 0.125  # the places lie evenly about the middle
            centre = middle + right_phase, middle + down_phase - down
            drawn.append(coverage(shape, centre, radius, side, side))
            shapes.append(shape)
    return np.array(drawn), shapes


@cache
def _unit_coverage(shape: Shape) -> np.ndarray:
    return coverage(shape, (50.0, 50.0), 40.0, 100, 100)


def _centroid_below_centre(shape: Shape) -> float:
    """How far a shape's centroid lies below its centre, in radii."""
    covered = _unit_coverage(shape)
    return float((covered.sum(1) @ (np.arange(100) + 0.5) / covered.sum() - 50.0) / 40.0)


def _areas(shape: Shape) -> dict[Size, float]:
    area = float(_unit_coverage(shape).sum()) / 40.0**2
    return {size: area * (diameter / 2) ** 2 for size, diameter in SIZES.items()}

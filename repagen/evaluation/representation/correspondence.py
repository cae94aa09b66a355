"""Correspondence read from features (DIFT, 2306.03881), on image pairs whose truth is a known warp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from repagen.errors import UserError
from repagen.evaluation.moments import as_matrix
from repagen.evaluation.representation.fitting import check_positive
from repagen.evaluation.representation.inputs import check_grid

_GREY = 0.5
Size = tuple[int, int]  # height and width


def match_points(
    source_tokens: torch.Tensor,
    target_tokens: torch.Tensor,
    grid: Size,
    points: torch.Tensor,
    image_size: Size,
) -> torch.Tensor:
    """Find the points of a target image whose features are nearest to those at the points of a source image.

    As DIFT: both maps of features are upsampled bilinearly to the image (pixel centres, `align_corners=False`), the
    source is read at each point, and the target pixel of largest cosine is the answer. Resolution: whole pixels. One
    exception: the pixels beyond the centres of the outermost cells all have that cell's features, so that they
    count as one candidate, at their middle (half a cell wide). Memory: H * W * (D + P) float32.

    Args:
        source_tokens: features (T, D) of the source, row-major, without prefix tokens.
        target_tokens: features (T, D) of the target.
        grid: (h, w) with h * w = T.
        points: (P, 2) x, y in pixels of the source; whole numbers are pixel centres, the first pixel is (0, 0).
        image_size: (H, W) of both images in pixels, at least the grid's.

    Returns:
        (P, 2) x, y in pixels of the target, float64 on the CPU.

    Raises:
        UserError: on a grid that does not fit; features that are not finite; points outside the image.
    """
    source, target = _feature_map(source_tokens, grid), _feature_map(target_tokens, grid)
    if source.shape != target.shape:
        raise UserError(
            f"cannot match {source.shape[1]} features with {target.shape[1]}; take both from the same layer"
        )
    if image_size[0] < grid[0] or image_size[1] < grid[1]:
        raise UserError(f"image_size: {image_size} is smaller than the grid {grid}; give pixels, (H, W)")
    points = _checked_points(points)
    outside = (~points_inside(points, image_size)).nonzero().flatten().tolist()
    if outside:
        raise UserError(
            f"point {outside[0]}, x, y {points[outside[0]].tolist()}, is outside the image of (H, W) {image_size}"
        )
    rows, columns = (_candidates(size, cells) for size, cells in zip(image_size, grid, strict=True))
    candidates = torch.cartesian_prod(rows, columns).flip(1)
    wanted = F.normalize(_sampled(source, points, image_size), dim=1)
    offered = F.normalize(_sampled(target, candidates, image_size), dim=1)
    return candidates[(wanted @ offered.T).argmax(dim=1)]


def pck(predicted: torch.Tensor, truth: torch.Tensor, *, image_size: Size, alpha: float = 0.1) -> float:
    """Percentage of correct keypoints as a fraction in [0, 1]: those at most alpha * max(H, W) from the truth.

    Args:
        predicted: (P, 2) x, y in pixels.
        truth: (P, 2) x, y in pixels.
        image_size: (H, W) in pixels.
        alpha: positive; published with 0.1, of the image or of the object's box.

    Raises:
        UserError: on no points, on sets of different size, on points that are not finite, on alpha <= 0.
    """
    check_positive(alpha=alpha)
    predicted, truth = _checked_points(predicted), _checked_points(truth)
    if len(predicted) != len(truth) or not len(truth):
        raise UserError(f"PCK needs a prediction for each of at least 1 point, got {len(predicted)} for {len(truth)}")
    return ((predicted - truth).norm(dim=1) <= alpha * max(image_size)).double().mean().item()


@dataclass(frozen=True)
class Warp:
    """A known map of images: the point p goes to A (p - c) + c + shift, with c the image's centre, all in pixels.

    Attributes:
        image_size: (H, W) in pixels.
        linear: A, two rows acting on (x, y).
        shift: (x, y) in pixels.
    """

    image_size: Size
    linear: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 0.0), (0.0, 1.0))
    shift: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        (a, b), (c, d) = self.linear
        if abs(a * d - b * c) < 1e-6:
            raise UserError(f"linear: {self.linear} maps the image to a line; its determinant must not be 0")

    @property
    def centre(self) -> torch.Tensor:
        """The fixed point of `linear`, (2,) x, y in pixels."""
        height, width = self.image_size
        return torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)


def identity_warp(image_size: Size) -> Warp:
    """Every point stays where it is."""
    return Warp(image_size)


def flip_warp(image_size: Size) -> Warp:
    """Left and right change places."""
    return Warp(image_size, linear=((-1.0, 0.0), (0.0, 1.0)))


def translation_warp(image_size: Size, shift: tuple[float, float]) -> Warp:
    """Everything moves by (x, y) pixels, right and down where positive."""
    return Warp(image_size, shift=shift)


def affine_warp(
    image_size: Size, *, degrees: float = 0.0, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)
) -> Warp:
    """Rotate clockwise on the screen about the centre, enlarge by `scale`, then move by (x, y) pixels."""
    cosine, sine = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    return Warp(image_size, ((cosine, -sine), (sine, cosine)), shift)


def warp_points(points: torch.Tensor, warp: Warp) -> torch.Tensor:
    """Return where points (P, 2), x, y in pixels, go; float64. Some may leave the image: see `points_inside`."""
    linear, shift = (torch.tensor(part, dtype=torch.float64) for part in (warp.linear, warp.shift))
    return (_checked_points(points) - warp.centre) @ linear.T + warp.centre + shift


def warp_images(images: torch.Tensor, warp: Warp) -> torch.Tensor:
    """Return images (B, 3, H, W) in [0, 1], of any float dtype, moved as `warp_points` moves points, bilinearly.

    What comes in from outside is mid-grey: a repeated border would offer the same features in several places.

    Raises:
        UserError: when the images have another size than the warp.
    """
    if images.ndim != 4 or tuple(images.shape[2:]) != tuple(warp.image_size):
        raise UserError(f"images must be (B, C, H, W) with (H, W) {warp.image_size}, got shape {tuple(images.shape)}")
    height, width = warp.image_size
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in warp.image_size)
    pixels = torch.cartesian_prod(rows, columns).flip(1)
    linear, shift = (torch.tensor(part, dtype=torch.float64) for part in (warp.linear, warp.shift))
    origins = (pixels - warp.centre - shift) @ torch.linalg.inv(linear).T + warp.centre
    places = _normalised(origins, warp.image_size).view(1, height, width, 2).to(images)
    places = places.expand(len(images), -1, -1, -1)
    return _GREY + F.grid_sample(images - _GREY, places, mode="bilinear", padding_mode="zeros", align_corners=False)


def points_inside(points: torch.Tensor, image_size: Size) -> torch.Tensor:
    """Return which points (P, 2), x, y in pixels, lie within the image's edges, (P,) bool."""
    return (_normalised(points, image_size).abs() <= 1).all(dim=1)


def regular_points(image_size: Size, per_side: int = 8) -> torch.Tensor:
    """Return the centres of per_side x per_side equal parts of an image: (per_side^2, 2) x, y in pixels, float64."""
    rows, columns = (
        (torch.arange(per_side, dtype=torch.float64) + 0.5) * size / per_side - 0.5 for size in image_size
    )
    return torch.cartesian_prod(rows, columns).flip(1)


def warp_pck(
    source_tokens: torch.Tensor,
    target_tokens: torch.Tensor,
    grid: Size,
    warp: Warp,
    *,
    per_side: int = 8,
    alpha: float = 0.1,
) -> float:
    """Return the PCK of `match_points` over images and their warped versions, pooled over images and points.

    The points are the `regular_points` that the warp keeps in the image.

    Args:
        source_tokens: features (B, T, D) of the images.
        target_tokens: features (B, T, D) of `warp_images` of them.
        grid: (h, w) with h * w = T.
        warp: the truth.
        per_side: points along each side of an image.
        alpha: as in `pck`.

    Raises:
        UserError: as `match_points` and `pck`, or when no point stays in the image.
    """
    if source_tokens.shape != target_tokens.shape or source_tokens.ndim != 3:
        raise UserError(
            "source and target features must be tokens (B, T, D) of the same shape, "
            f"got {tuple(source_tokens.shape)} and {tuple(target_tokens.shape)}"
        )
    points = regular_points(warp.image_size, per_side)
    points = points[points_inside(warp_points(points, warp), warp.image_size)]
    matched = [
        match_points(source, target, grid, points, warp.image_size)
        for source, target in zip(source_tokens, target_tokens, strict=True)
    ]
    truth = warp_points(points, warp).repeat(len(matched), 1)
    return pck(torch.cat(matched), truth, image_size=warp.image_size, alpha=alpha)


def _checked_points(points: torch.Tensor) -> torch.Tensor:
    if points.ndim != 2 or points.shape[1] != 2 or not points.isfinite().all():
        raise UserError(f"points must be finite x, y of shape (P, 2), got shape {tuple(points.shape)}")
    return points.detach().to("cpu", torch.float64)


def _feature_map(tokens: torch.Tensor, grid: Size) -> torch.Tensor:
    """Return tokens (T, D) as a map (1, D, h, w) float32."""
    checked = as_matrix(tokens)
    check_grid(len(checked), grid)
    return checked.float().T.reshape(1, -1, *grid)


def _normalised(points: torch.Tensor, image_size: Size) -> torch.Tensor:
    """Return x, y in pixels as `grid_sample` counts them: -1 and 1 are the image's edges."""
    height, width = image_size
    return (2 * points + 1) / torch.tensor([width, height], dtype=points.dtype) - 1


def _sampled(features: torch.Tensor, points: torch.Tensor, image_size: Size) -> torch.Tensor:
    """Read a map (1, D, h, w) bilinearly at points (P, 2): (P, D)."""
    places = _normalised(points, image_size).to(features)[None, None]
    return F.grid_sample(features, places, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0].T


def _candidates(size: int, cells: int) -> torch.Tensor:
    """Return the coordinates along one side that `match_points` tells apart: pixels, and the middle of each border."""
    pixels = torch.arange(size, dtype=torch.float64)
    places = ((pixels + 0.5) * cells / size - 0.5).clamp(0, cells - 1)
    return torch.stack([pixels[places == place].mean() for place in places.unique()])

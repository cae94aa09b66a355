from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.evaluation.representation.correspondence import (
    Warp,
    affine_warp,
    flip_warp,
    identity_warp,
    match_points,
    pck,
    points_inside,
    regular_points,
    translation_warp,
    warp_images,
    warp_pck,
    warp_points,
)

SIZE = (40, 56)
WARPS = {
    "identity": identity_warp(SIZE),
    "flip": flip_warp(SIZE),
    "translation": translation_warp(SIZE, (5, -3)),
    "affine": affine_warp(SIZE, degrees=20, scale=0.8, shift=(2.5, -1.5)),
}


def dots(points: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """One image (1, 3, H, W) for each point, grey with a soft dot there."""
    rows, columns = torch.meshgrid(*(torch.arange(side).double() for side in size), indexing="ij")
    squares = [(columns - x) ** 2 + (rows - y) ** 2 for x, y in points.tolist()]
    return 0.5 + 0.5 * torch.exp(-torch.stack(squares) / 8)[:, None].expand(-1, 3, -1, -1)


def centroids(images: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.meshgrid(*(torch.arange(side).double() for side in images.shape[2:]), indexing="ij")
    dot = images[:, 0] - 0.5
    weights = dot / dot.sum(dim=(1, 2), keepdim=True)
    return torch.stack([(weights * columns).sum(dim=(1, 2)), (weights * rows).sum(dim=(1, 2))], dim=1)


@pytest.mark.parametrize("name", WARPS)
def test_images_move_as_points_do(name: str) -> None:
    points = torch.tensor([[20.0, 15.0], [33.0, 17.5], [26.0, 24.0]])
    moved = centroids(warp_images(dots(points, SIZE), WARPS[name]))
    torch.testing.assert_close(moved, warp_points(points, WARPS[name]), atol=0.02, rtol=0)
    if name != "identity":
        assert (moved - points).norm(dim=1).max() > 2


def test_warps_in_closed_form() -> None:
    images = torch.rand(2, 3, *SIZE)
    torch.testing.assert_close(warp_images(images, WARPS["identity"]), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(warp_images(images, WARPS["flip"]), images.flip(3), atol=1e-5, rtol=0)
    shifted = warp_images(images, WARPS["translation"])
    torch.testing.assert_close(shifted[:, :, :-3, 5:], images[:, :, 3:, :-5], atol=1e-5, rtol=0)
    assert (shifted[:, :, :, :5] == 0.5).all() and (shifted[:, :, -3:] == 0.5).all()
    corner = torch.tensor([[0.0, 0.0]])
    assert warp_points(corner, WARPS["flip"]).tolist() == [[55, 0]]
    quarter = affine_warp((9, 9), degrees=90)  # clockwise on the screen: the left end of the middle row goes up
    torch.testing.assert_close(warp_points(torch.tensor([[0.0, 4.0]]), quarter), torch.tensor([[4.0, 0.0]]).double())


def test_points_inside_are_those_on_pixels() -> None:
    points = torch.tensor([[-0.5, 0.0], [-0.6, 0.0], [55.5, 39.5], [55.0, 39.7], [30.0, 20.0]])
    assert points_inside(points, SIZE).tolist() == [True, False, True, False, True]
    assert regular_points((4, 8), 2).tolist() == [[1.5, 0.5], [5.5, 0.5], [1.5, 2.5], [5.5, 2.5]]


def match_by_loops(
    source: torch.Tensor, target: torch.Tensor, grid: tuple[int, int], points: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """DIFT as published: upsample both maps to the image, nearest pixel by cosine."""
    maps = [tokens.T.reshape(1, -1, *grid) for tokens in (source, target)]
    large = [F.interpolate(one, size, mode="bilinear", align_corners=False)[0] for one in maps]
    found = []
    for x, y in points.long().tolist():
        cosines = F.cosine_similarity(large[0][:, y, x][:, None, None], large[1], dim=0)
        best = int(cosines.argmax())
        found.append([best % size[1], best // size[1]])
    return torch.tensor(found).double()


def test_matching_is_dift_on_upsampled_maps() -> None:
    """Away from the half cells along the border, which the upsampled map fills with copies."""
    grid, size = (6, 7), (24, 35)
    source = torch.randn(42, 16)
    target = source.view(6, 7, 16).roll((1, 2), (0, 1)).flatten(0, 1) + 0.2 * torch.randn(42, 16)
    points = regular_points(size, 6).round()
    ours, theirs = match_points(source, target, grid, points, size), match_by_loops(source, target, grid, points, size)
    inner = (theirs[:, 0] > 3) & (theirs[:, 0] < 31) & (theirs[:, 1] > 2) & (theirs[:, 1] < 21)
    assert inner.sum() >= 10
    torch.testing.assert_close(ours[inner], theirs[inner])


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 4), (8, 8), (16, 16)])
def test_a_point_finds_itself_to_within_a_quarter_of_a_cell(grid: tuple[int, int]) -> None:
    """Beyond the outermost cell centres all features are the same; the middle of that border is the answer."""
    tokens, size = torch.randn(grid[0] * grid[1], 32), (64, 64)
    points = regular_points(size, 64)
    found = match_points(tokens, tokens, grid, points, size)
    bound = 0.5 if grid != (1, 1) else 1  # a single cell has one answer: the middle of the image
    limits = torch.tensor([64 / grid[1], 64 / grid[0]]).double() * (bound / 2)
    assert ((found - points).abs() <= limits + 1e-9).all()
    if grid != (1, 1):
        edge = torch.tensor([64 / grid[1], 64 / grid[0]]) / 2
        inner = ((points > edge) & (points < 63 - edge)).all(dim=1)
        torch.testing.assert_close(found[inner], points[inner])


def test_an_identity_warp_is_matched_on_the_tokens_of_an_encoder(encoder: VisionEncoder) -> None:
    images, warp = torch.rand(6, 3, 16, 16), identity_warp((16, 16))
    tokens = encoder(images).tokens
    assert warp_pck(tokens, encoder(warp_images(images, warp)).tokens, (4, 4), warp) > 0.95
    assert warp_pck(tokens, tokens.roll(1, 0), (4, 4), warp) < 0.5


def test_noise_costs_correspondence() -> None:
    warp, tokens = identity_warp((64, 64)), torch.randn(3, 64, 24)
    values = [warp_pck(tokens, tokens + noise * torch.randn(3, 64, 24), (8, 8), warp) for noise in (0.0, 1.0, 3.0)]
    assert values[0] == 1 > values[1] > values[2]


@pytest.mark.parametrize("warp", [flip_warp((64, 64)), translation_warp((64, 64), (16, -8))])
def test_features_that_move_with_the_image_are_found(warp: Warp) -> None:
    """Tokens are the mean colours of patches, in 24 colours; the warp moves them by whole cells."""
    images = F.interpolate(torch.rand(4, 24, 8, 8), (64, 64), mode="nearest")
    tokens = [F.avg_pool2d(one, 8).flatten(2).transpose(1, 2) - 0.4 for one in (images, warp_images(images, warp))]
    assert warp_pck(tokens[0], tokens[1], (8, 8), warp) > 0.95
    assert warp_pck(tokens[0], tokens[0], (8, 8), warp) < 0.3


def test_pck_counts_the_longer_side() -> None:
    truth = torch.tensor([[10.0, 10.0]] * 4)
    predicted = truth + torch.tensor([[0.0, 0.0], [5.0, 0.0], [3.0, 4.1], [0.0, -5.0]])
    assert pck(predicted, truth, image_size=(20, 50)) == 0.75
    assert pck(predicted, truth, image_size=(20, 50), alpha=0.05) == 0.25


def test_user_mistakes_are_refused() -> None:
    tokens, points = torch.randn(16, 8), torch.tensor([[3.0, 3.0]])
    with pytest.raises(UserError, match="4 x 5 cells do not hold 16 tokens"):
        match_points(tokens, tokens, (4, 5), points, (16, 16))
    with pytest.raises(UserError, match="cannot match 8 features with 7"):
        match_points(tokens, tokens[:, :7], (4, 4), points, (16, 16))
    with pytest.raises(UserError, match=r"smaller than the grid \(4, 4\)"):
        match_points(tokens, tokens, (4, 4), points, (3, 16))
    with pytest.raises(UserError, match=r"point 1, x, y \[16.0, 3.0\], is outside"):
        match_points(tokens, tokens, (4, 4), torch.tensor([[3.0, 3.0], [16.0, 3.0]]), (16, 16))
    with pytest.raises(UserError, match=r"shape \(P, 2\)"):
        match_points(tokens, tokens, (4, 4), points[0], (16, 16))
    with pytest.raises(UserError, match="got 1 for 0"):
        pck(points, points[:0], image_size=(16, 16))
    with pytest.raises(UserError, match="alpha: must be above 0"):
        pck(points, points, image_size=(16, 16), alpha=0)
    with pytest.raises(UserError, match="maps the image to a line"):
        affine_warp((16, 16), scale=0)
    with pytest.raises(UserError, match=r"\(H, W\) \(16, 16\), got shape \(1, 3, 8, 8\)"):
        warp_images(torch.rand(1, 3, 8, 8), identity_warp((16, 16)))
    with pytest.raises(UserError, match="same shape"):
        warp_pck(tokens[None], tokens, (4, 4), identity_warp((16, 16)))
    with pytest.raises(UserError, match="at least 1 point, got 0 for 0"):
        warp_pck(tokens[None], tokens[None], (4, 4), translation_warp((16, 16), (50, 0)))

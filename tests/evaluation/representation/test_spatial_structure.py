from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repagen.errors import UserError
from repagen.evaluation.representation.spatial import (
    SpatialStructure,
    correlation_decay_slope,
    local_distant_similarity,
    spatial_contrast_rms,
    spatial_structure,
)


def random_field(side: int, count: int = 3, dim: int = 12) -> torch.Tensor:
    return torch.randn(count, side * side, dim)


def smooth_field(side: int, count: int = 3, dim: int = 12) -> torch.Tensor:
    coarse = torch.randn(count, dim, 4, 4)
    return F.interpolate(coarse, (side, side), mode="bicubic").flatten(2).transpose(1, 2)


def cosines_by_loops(tokens: torch.Tensor, side: int) -> dict[int, list[float]]:
    """Distance => the cosines of all pairs of tokens of an image at that distance."""
    found: dict[int, list[float]] = {}
    for image in tokens.double():
        for a in range(side * side):
            for b in range(a + 1, side * side):
                distance = abs(a // side - b // side) + abs(a % side - b % side)
                found.setdefault(distance, []).append(F.cosine_similarity(image[a], image[b], dim=0).item())
    return found


@pytest.mark.parametrize(("side", "distant", "furthest"), [(4, 2, 2), (8, 3, 4), (12, 4, 6)])
def test_lds_and_cds_are_their_definitions(side: int, distant: int, furthest: int) -> None:
    """On small grids the distances shrink with the side: 6 and 8 of 16 are 3 and 4 of 8."""
    tokens = smooth_field(side, count=2) + 0.3 * random_field(side, count=2)
    cosines = cosines_by_loops(tokens, side)
    far = [value for distance, values in cosines.items() if distance >= distant for value in values]
    assert local_distant_similarity(tokens, (side, side)) == pytest.approx(
        np.mean(cosines[1]) - np.mean(far), abs=1e-9
    )
    steps = np.arange(1, furthest + 1)
    slope = np.polyfit(steps, [np.mean(cosines[step]) for step in steps], 1)[0]
    assert correlation_decay_slope(tokens, (side, side)) == pytest.approx(-slope, abs=1e-9)


def test_at_the_published_grid_and_above_distances_stay_as_published() -> None:
    for side in (16, 20):
        tokens = smooth_field(side, count=1)
        units = F.normalize(tokens[0].double(), dim=1)
        places = torch.stack([torch.arange(side * side) // side, torch.arange(side * side) % side], dim=1)
        distances = torch.cdist(places.double(), places.double(), p=1).round().long()
        cosines = units @ units.T
        expected = cosines[distances == 1].mean() - cosines[distances >= 6].mean()
        assert local_distant_similarity(tokens, (side, side)) == pytest.approx(expected.item(), abs=1e-12)
        means = [cosines[distances == step].mean().item() for step in range(1, 9)]
        expected_slope = -np.polyfit(np.arange(1, 9), means, 1)[0]
        assert correlation_decay_slope(tokens, (side, side)) == pytest.approx(expected_slope, abs=1e-12)


def test_a_constant_field_has_no_structure() -> None:
    tokens = torch.randn(2, 1, 6).expand(2, 64, 6) * torch.rand(2, 64, 1).add(0.5)  # lengths do not count
    structure = spatial_structure(tokens, (8, 8))
    assert (structure.lds, structure.cds, structure.rmsc) == pytest.approx((0, 0, 0), abs=1e-6)


def test_a_smooth_field_has_more_than_a_shuffled_one() -> None:
    smooth = smooth_field(16)
    shuffled = smooth[:, torch.randperm(256)]
    before, after = (spatial_structure(tokens, (16, 16)) for tokens in (smooth, shuffled))
    assert before.lds > 0.3 > 0.1 > abs(after.lds)
    assert before.cds > 0.03 > 0.01 > abs(after.cds)
    assert before.rmsc == pytest.approx(after.rmsc, abs=1e-12)  # it does not see where tokens are


def test_contrast_in_closed_form() -> None:
    """Half the tokens e1 and half e2: the mean is (1/2, 1/2), each lies sqrt(1/2) from it."""
    half = torch.tensor([[5.0, 0.0]] * 8 + [[0.0, 2.0]] * 8)
    assert spatial_contrast_rms(half[None]) == pytest.approx(0.5**0.5)
    opposite = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert spatial_contrast_rms(opposite[None]) == pytest.approx(1)
    assert spatial_contrast_rms(torch.stack([opposite, opposite.abs()])) == pytest.approx(0.5)  # mean over images


def test_a_checkerboard_in_closed_form() -> None:
    """Cosine (-1)^d: neighbours -1; on 2 x 2 the distant pairs are the diagonals, 1; the slope over d = 1, 2 is 2."""
    board = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])[None]
    assert spatial_structure(board, (2, 2)) == SpatialStructure(lds=-2, cds=-2, rmsc=1)


def test_the_rows_of_a_grid_that_is_not_square_in_closed_form() -> None:
    """Each row of 4 x 16 has its own direction: cosine 1 in 60 of 108 pairs of neighbours, in 420 of 1908 others."""
    rows = torch.eye(4).repeat_interleave(16, dim=0)[None]
    assert local_distant_similarity(rows, (4, 16)) == pytest.approx(60 / 108 - 420 / 1908)


def test_user_mistakes_are_refused() -> None:
    tokens = torch.randn(2, 16, 5)
    with pytest.raises(UserError, match="4 x 5 cells do not hold 16 tokens"):
        local_distant_similarity(tokens, (4, 5))
    with pytest.raises(UserError, match="no tokens 2 cells apart"):
        local_distant_similarity(tokens[:, :2], (1, 2))
    with pytest.raises(UserError, match="no tokens 8 cells apart"):
        correlation_decay_slope(tokens, (4, 4), max_distance=32)
    with pytest.raises(UserError, match="at least 2 tokens per image"):
        spatial_contrast_rms(tokens[:, :1])
    with pytest.raises(UserError, match=r"tokens \(B, T, D\)"):
        spatial_contrast_rms(tokens[0])
    with pytest.raises(UserError, match="at least 2 cells, got 1"):
        local_distant_similarity(tokens, (4, 4), distant=1)
    broken, dead = tokens.clone(), tokens.clone()
    broken[1, 3, 0], dead[1, 3] = torch.inf, 0
    with pytest.raises(UserError, match="sample 1 are not finite"):
        spatial_structure(broken, (4, 4))
    with pytest.raises(UserError, match="token 3 of sample 1 is all zero"):
        spatial_structure(dead, (4, 4))

"""Balls around features that reach to the k-th nearest other feature, and what lies in them.

Distances are taken by blocks of 1024 x 1024, so that memory does not grow with the number of images.
"""

from __future__ import annotations

import torch

from repagen.evaluation.moments import ROWS


def ball_radii(centres: torch.Tensor, neighbours: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance (N,) of each of N > k points (N, D) to its k-th nearest other point, computed in `dtype`."""
    radii = torch.empty(len(centres), dtype=dtype)
    for rows, radius in zip(centres.split(ROWS), radii.split(ROWS), strict=True):
        nearest = torch.empty(len(rows), 0, dtype=dtype)
        for others in centres.split(ROWS):
            distances = torch.cat([nearest, torch.cdist(rows.to(dtype), others.to(dtype))], dim=1)
            # The nearest point of the own set is the point itself: hence k + 1.
            nearest = distances.topk(min(neighbours + 1, distances.shape[1]), largest=False).values
        radius.copy_(nearest[:, -1])
    return radii


def count_in_balls(
    points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor, *, with_edge: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count which points lie in which balls, computed in the dtype of the radii.

    Args:
        points: (N, D).
        centres: (M, D).
        radii: (M,).
        with_edge: whether a point at exactly the radius lies in the ball.

    Returns:
        Balls around each point (N,) and points in each ball (M,), int64.
    """
    around, within = torch.zeros(len(points), dtype=torch.int64), torch.zeros(len(centres), dtype=torch.int64)
    for rows, around_rows in zip(points.split(ROWS), around.split(ROWS), strict=True):
        for balls, radius, within_balls in zip(
            centres.split(ROWS), radii.split(ROWS), within.split(ROWS), strict=True
        ):
            distances = torch.cdist(rows.to(radii.dtype), balls.to(radii.dtype))
            inside = distances <= radius if with_edge else distances < radius
            around_rows += inside.sum(dim=1)
            within_balls += inside.sum(dim=0)
    return around, within

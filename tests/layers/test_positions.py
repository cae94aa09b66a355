"""Positions on grids other than a model's own, and the tables made of them."""

from __future__ import annotations

import pytest
import torch

from repagen.layers import rope
from repagen.layers.embeddings import sincos_position_table
from repagen.layers.positions import grid_positions
from repagen.layers.rope import RotaryTable, rotary_table


def test_own_grid_counts_from_zero() -> None:
    rows, columns = grid_positions((3, 5), (3, 5))
    assert rows.tolist() == [0, 1, 2] and columns.tolist() == [0, 1, 2, 3, 4]
    for function in (rotary_table, sincos_position_table):
        plain, same = function((3, 5), 8), function((3, 5), 8, base_grid=(3, 5))
        assert all(torch.equal(one, other) for one, other in zip(plain, same, strict=True))


@pytest.mark.parametrize("factor", [2, 3])
def test_a_multiple_of_the_grid_interpolates_it(factor: int) -> None:
    for positions, n in zip(grid_positions((4 * factor, 6 * factor), (4, 6)), (4, 6), strict=True):
        expected = [(i + 0.5) / factor - 0.5 for i in range(n * factor)]
        assert positions.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (8, 2), (3, 5), (16, 9), (1, 1)])
def test_other_grids_keep_centre_area_and_squares(grid: tuple[int, int]) -> None:
    rows, columns = grid_positions(grid, (4, 4))
    assert rows.mean().item() == pytest.approx(1.5) and columns.mean().item() == pytest.approx(1.5)
    steps = torch.cat([rows.diff(), columns.diff()])
    side = (16 / (grid[0] * grid[1])) ** 0.5
    assert torch.allclose(steps, torch.full_like(steps, side))  # as far in a row as in a column
    assert grid[0] * side * grid[1] * side == pytest.approx(16)


def test_tables_of_another_grid_are_made_once_and_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(rope, "rotary_table", lambda *args, **more: made.append(args) or rotary_table(*args, **more))
    rope._other_table.cache_clear()
    table = RotaryTable((4, 4), 8, num_unrotated=2)
    before, made[:] = set(table.state_dict()), []
    with torch.inference_mode():
        first = table((2, 8), num_appended=3)
    second = table((2, 8), num_appended=3)
    assert len(made) == 1 and set(table.state_dict()) == before
    expected = rotary_table((2, 8), 8, base_grid=(4, 4))
    for one, other, values, rest in zip(first, second, expected, (1.0, 0.0), strict=True):
        assert one.shape == (16 + 2 + 3, 8) and torch.equal(one, other)
        assert torch.equal(one[:16], values) and bool((one[16:] == rest).all())
    query = torch.zeros(8, requires_grad=True)
    (query * second[0]).sum().backward()  # made under inference mode first, and trained with now


def test_own_table_is_the_saved_one() -> None:
    table = RotaryTable((4, 4), 8, num_unrotated=2)
    table.cos.add_(1)  # as loaded from a file that has other values
    for grid in (None, (4, 4)):
        assert torch.equal(table(grid)[0], table.cos)
        assert torch.equal(table(grid, num_appended=1)[0], torch.cat([table.cos, torch.ones(1, 8)]))

from __future__ import annotations

import torch

from repagen.data.digits import digits_to_images, load_digits
from repagen.quickstart.judge import agreement, nearest_distance, to_small, train_digit_classifier


def pictures(subset: str) -> tuple[torch.Tensor, torch.Tensor]:
    digits, labels = load_digits(subset)
    return torch.from_numpy(digits).float().div(255)[:, None], torch.from_numpy(labels)


def test_small_pictures_undo_the_scaling() -> None:
    digits, _ = load_digits("validation")
    torch.testing.assert_close(to_small(digits_to_images(digits)), pictures("validation")[0])


def test_the_judge_knows_digits_it_never_saw_and_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    classifier = train_digit_classifier(*pictures("train"), seed=0, num_steps=150)
    assert torch.equal(torch.get_rng_state(), before)
    held_out, labels = pictures("validation")
    assert agreement(classifier, held_out, labels) > 0.96
    assert agreement(classifier, held_out, (labels + 1) % 10) < 0.03
    assert agreement(classifier, torch.rand_like(held_out), labels) < 0.4


def test_copies_lie_at_distance_zero() -> None:
    train, held_out = pictures("train")[0], pictures("validation")[0]
    assert nearest_distance(train[:50], train) < 1e-3
    assert nearest_distance(held_out, train) > 0.5

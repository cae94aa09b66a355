"""Labels from what files say: names or numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def labels_of_names(names: Sequence[str]) -> tuple[torch.Tensor, list[str]]:
    """Return the labels (N,) int64 of class names, and the names sorted: label k is name k."""
    class_names = sorted(set(names))
    number = {name: label for label, name in enumerate(class_names)}
    return torch.tensor([number[name] for name in names], dtype=torch.int64), class_names


def labels_of_numbers(numbers: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
    """Return class numbers from 0 on as labels (N,) int64, and the names "0" ... "max" of the classes."""
    return torch.tensor(numbers, dtype=torch.int64), [str(number) for number in range(max(numbers) + 1)]

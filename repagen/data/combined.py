"""Several datasets as one, each with labels of its own."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from repagen.data.captions import Captions
from repagen.data.dataset import SampleDataset
from repagen.errors import UserError


class CombinedDataset(SampleDataset):
    """The samples of several datasets, one after the other, under the labels of the whole.

    Args:
        parts: datasets, each with the label of the whole that each of its own labels becomes; none for one without
            classes, or whose classes do not matter.
        class_names: of the labels of the whole; empty without classes.

    Raises:
        UserError: the parts have buckets of different sizes.
    """

    def __init__(self, parts: Sequence[tuple[SampleDataset, Sequence[int]]], class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.parts = [(dataset, list(labels)) for dataset, labels in parts]
        self.has_captions = all(dataset.has_captions for dataset, _ in parts)
        self._ends = list(accumulate(len(dataset) for dataset, _ in parts))
        for dataset, labels in self.parts:
            assert len(labels) == (dataset.num_classes if self.class_names else 0), "a label for each of the part's"
            assert bool(labels) == bool(self.class_names), "all parts have classes, or none has"
        self.bucket_sizes = self.parts[0][0].bucket_sizes
        if any(list(dataset.bucket_sizes) != list(self.bucket_sizes) for dataset, _ in self.parts):
            raise UserError("data.buckets: the datasets that are combined have images of different sizes")

    @property
    def buckets(self) -> torch.Tensor | None:
        """See `SampleDataset.buckets`."""
        buckets = [dataset.buckets for dataset, _ in self.parts]
        return torch.cat([found for found in buckets if found is not None]) if self.bucket_sizes else None

    def __len__(self) -> int:
        return self._ends[-1]

    def load(self, index: int, generator: torch.Generator | None = None) -> Any:
        """Return sample `index` of the whole, with its label and index there."""
        dataset, labels, own = self._place(index)
        sample = dataset.load(own, generator)
        return {**sample, "label": labels[sample["label"]] if labels else 0, "index": index}

    def captions(self, index: int) -> Captions:
        """Return all captions of sample `index`; where every part has captions."""
        dataset, _, own = self._place(index)
        return dataset.captions(own)

    def describe(self, index: int) -> str:
        """Return where sample `index` comes from."""
        dataset, _, own = self._place(index)
        return dataset.describe(own)

    def fingerprint(self) -> str:
        """Return a hash of the parts, in their order, and of what their labels become."""
        facts = [[dataset.fingerprint(), labels] for dataset, labels in self.parts]
        return hashlib.sha256(repr([facts, self.class_names]).encode()).hexdigest()

    def _place(self, index: int) -> tuple[SampleDataset, list[int], int]:
        """=> the part that holds a sample, what its labels become, the sample's index there."""
        number = bisect_right(self._ends, index)
        dataset, labels = self.parts[number]
        return dataset, labels, index - (self._ends[number] - len(dataset))

"""An independent judge of generated digits: a classifier and nearest-neighbour distances in pixel space.

It sees only the 8x8 pictures and shares nothing with the encoder, the autoencoder or the generator it judges.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from repagen.randomness import generator_for


def to_small(images: torch.Tensor) -> torch.Tensor:
    """Average images (B, 3, 8k, 8k) in [0, 1] over channels and k x k blocks to (B, 1, 8, 8)."""
    return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8)


def _build_classifier(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 16, num_classes),
    )


def train_digit_classifier(
    pictures: torch.Tensor, labels: torch.Tensor, *, seed: int, num_steps: int = 400, num_classes: int = 10
) -> nn.Sequential:
    """Train a small convolutional classifier on real digits, and on further classes where there are any.

    Args:
        pictures: (N, 1, 8, 8) float32 in [0, 1].
        labels: (N,) int64 in [0, num_classes).
        seed: of the initial weights, batches and dropout; the global random state is left as it was.
        num_steps: optimiser steps of batch 128.
        num_classes: digits and further ones.

    Returns:
        The classifier in evaluation mode: (B, 1, 8, 8) => logits (B, num_classes).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = _build_classifier(num_classes)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.01)
        batches = generator_for(seed, "digit classifier batches")
        for _ in range(num_steps):
            chosen = torch.randint(len(pictures), (128,), generator=batches)
            loss = F.cross_entropy(classifier(pictures[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.eval()


@torch.no_grad()
def agreement(classifier: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction of pictures (N, 1, 8, 8) to which the classifier gives their label (N,)."""
    return (classifier(pictures).argmax(1) == labels).float().mean().item()


def nearest_distance(pictures: torch.Tensor, references: torch.Tensor) -> float:
    """Mean Euclidean distance of each picture (N, 1, 8, 8) to the nearest of the references (M, 1, 8, 8)."""
    return torch.cdist(pictures.flatten(1), references.flatten(1)).min(1).values.mean().item()

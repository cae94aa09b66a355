"""torch-fidelity's own run over pictures, as oracle: its loader, a registered extractor, its metrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch_fidelity
from torch.utils.data import Dataset

SUBSETS, SUBSET_SIZE = 20, 100


class Pictures(Dataset[torch.Tensor]):
    def __init__(self, pictures: torch.Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pictures[index]


def features_of(pictures: torch.Tensor) -> torch.Tensor:
    return pictures[:, 0].flatten(1).float() / 64


def logits_of(pictures: torch.Tensor) -> torch.Tensor:
    return pictures[:, 1].flatten(1).float() / 32


class PixelExtractor(torch_fidelity.FeatureExtractorBase):
    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, str]:
        return "features", "logits"

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        every = {"features": features_of(pictures), "logits": logits_of(pictures)}
        return tuple(every[name] for name in self.features_list)


@dataclass(frozen=True)
class TorchFidelityRun:
    samples: torch.Tensor
    reference: torch.Tensor
    logits: torch.Tensor
    figures: dict[str, float]


@cache
def torch_fidelity_run() -> TorchFidelityRun:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 403, 3, 4, 4, generator=generator)
    noise[0] = noise[0] * 0.9 + 0.15
    samples, reference = (noise * 40 + 128).clamp(0, 255).to(torch.uint8)
    reference = reference[:350]
    torch_fidelity.register_feature_extractor("pixels", PixelExtractor)
    figures = torch_fidelity.calculate_metrics(
        input1=Pictures(samples),
        input2=Pictures(reference),
        cuda=False,
        isc=True,
        kid=True,
        prc=True,
        feature_extractor="pixels",
        feature_layer_isc="logits",
        feature_layer_kid="features",
        feature_layer_prc="features",
        kid_subsets=SUBSETS,
        kid_subset_size=SUBSET_SIZE,
        save_cpu_ram=True,
        verbose=False,
    )
    return TorchFidelityRun(features_of(samples), features_of(reference), logits_of(samples), figures)

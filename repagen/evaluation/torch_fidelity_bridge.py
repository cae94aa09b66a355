"""Our feature extractors inside torch-fidelity, so that its own programs measure in any encoder's space."""

from __future__ import annotations

import os
from typing import Any

import torch

from repagen.errors import UserError
from repagen.evaluation.extraction import FORWARD_BATCH_SIZE
from repagen.evaluation.extractor import FeatureExtractor, full_float32, in_fixed_batches


def register_with_torch_fidelity(extractor: FeatureExtractor, name: str) -> str:
    """Let `torch_fidelity.calculate_metrics(feature_extractor=name, ...)` use an extractor.

    Its features come out bit by bit as in `evaluate_generation`, whatever batch size torch-fidelity reads with. The
    first feature serves every metric; the Inception Score takes `logits`, where the extractor has them, or needs
    `feature_layer_isc`. Registered names last as long as the process; they cannot be taken back.

    Args:
        extractor: any `FeatureExtractor`; it stays on its own device.
        name: to register under. torch-fidelity's cache goes by this name alone, so give different weights different
            names.

    Returns:
        The name.

    Raises:
        UserError: for a name that is taken, empty, or holds a path separator or outer white space.
    """
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    if not name or name != name.strip() or os.sep in name:
        raise UserError(f"name of an extractor must be a word without {os.sep!r} and outer spaces, got {name!r}")
    if name in FEATURE_EXTRACTORS_REGISTRY:
        raise UserError(f"torch-fidelity has an extractor {name!r} already; choose another name")

    class RegisteredExtractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)  # it is handed every argument of calculate_metrics

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return tuple(extractor.dimensions)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            if metric != "isc":
                return next(iter(extractor.dimensions))
            if "logits" not in extractor.dimensions:
                raise UserError(
                    f"{name} has no logits for the Inception Score; give feature_layer_isc, or leave it out"
                )
            return "logits"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with full_float32(images.device):
                features = in_fixed_batches(extractor, images, FORWARD_BATCH_SIZE)
            return tuple(features[feature] for feature in self.features_list)

    register_feature_extractor(name, RegisteredExtractor)
    return name

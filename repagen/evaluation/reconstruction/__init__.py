"""How well an autoencoder gives images back."""

from __future__ import annotations

from repagen.evaluation.reconstruction.evaluate import evaluate_reconstruction, reconstruct
from repagen.evaluation.reconstruction.picture import save_case_picture
from repagen.evaluation.reconstruction.pixel_metrics import peak_signal_to_noise_ratio, structural_similarity
from repagen.evaluation.reconstruction.result import ReconstructionResult

__all__ = [
    "ReconstructionResult",
    "evaluate_reconstruction",
    "peak_signal_to_noise_ratio",
    "reconstruct",
    "save_case_picture",
    "structural_similarity",
]

"""What features know: probes, likeness to an encoder, spatial structure, correspondence, mixes of layers and times."""

from __future__ import annotations

from repagen.evaluation.representation.correspondence import match_points, pck, warp_pck
from repagen.evaluation.representation.harvest import Harvest, harvest_encoder, harvest_generator
from repagen.evaluation.representation.heatmap import save_heat_maps
from repagen.evaluation.representation.hyperfeatures import (
    HyperfeatureMix,
    HyperfeatureResult,
    train_hyperfeature_correspondence,
    train_hyperfeature_probe,
)
from repagen.evaluation.representation.probes import ProbeResult, attentive_probe, knn_probe, linear_probe
from repagen.evaluation.representation.readouts import ReadOutSettings
from repagen.evaluation.representation.result import Reading, RepresentationResult
from repagen.evaluation.representation.similarity import cknna, unbiased_cka
from repagen.evaluation.representation.sources import FeatureSlice
from repagen.evaluation.representation.spatial import SpatialStructure, spatial_structure
from repagen.evaluation.representation.sweep import evaluate_representation

__all__ = [
    "FeatureSlice",
    "Harvest",
    "HyperfeatureMix",
    "HyperfeatureResult",
    "ProbeResult",
    "ReadOutSettings",
    "Reading",
    "RepresentationResult",
    "SpatialStructure",
    "attentive_probe",
    "cknna",
    "evaluate_representation",
    "harvest_encoder",
    "harvest_generator",
    "knn_probe",
    "linear_probe",
    "match_points",
    "pck",
    "save_heat_maps",
    "spatial_structure",
    "train_hyperfeature_correspondence",
    "train_hyperfeature_probe",
    "unbiased_cka",
    "warp_pck",
]

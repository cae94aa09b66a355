"""Representation alignment (REPA, iREPA): projectors, losses, weight schedules; attached to a generator by hooks."""

from repagen.alignment.losses import cosine_loss, spatial_cosine_loss, spatially_normalise
from repagen.alignment.representation import AlignmentTarget, RepresentationAlignment
from repagen.alignment.schedules import AlignmentSchedule, alignment_weight

__all__ = [
    "AlignmentSchedule",
    "AlignmentTarget",
    "RepresentationAlignment",
    "alignment_weight",
    "cosine_loss",
    "spatial_cosine_loss",
    "spatially_normalise",
]

"""Captioned scenes of simple shapes, drawn by code, with an exact checker that reads pictures.

A scene holds one to three objects on a plain background, each in a quadrant of its own. Its prompts say all or a part
of it, and carry beside the words what they ask for, so that nothing has to be parsed: a small GenEval (2310.11513)
whose truth is known.
"""

from __future__ import annotations

from repagen.data.shapes.checker import (
    FoundObject,
    FoundScene,
    SceneVerdict,
    check_picture,
    check_scene,
    judge,
    read_picture,
)
from repagen.data.shapes.dataset import ShapesDataset, shapes_encoders_path, shapes_pipeline_path
from repagen.data.shapes.drawing import draw_scene
from repagen.data.shapes.prompts import ObjectRequest, ScenePrompt
from repagen.data.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    NEW_SHAPES,
    QUADRANTS,
    SHAPES,
    SIZES,
    UNSEEN_KINDS,
    Scene,
    SceneObject,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "NEW_SHAPES",
    "QUADRANTS",
    "SHAPES",
    "SIZES",
    "UNSEEN_KINDS",
    "FoundObject",
    "FoundScene",
    "ObjectRequest",
    "Scene",
    "SceneObject",
    "ScenePrompt",
    "SceneVerdict",
    "ShapesDataset",
    "check_picture",
    "check_scene",
    "draw_scene",
    "judge",
    "read_picture",
    "sample_scene",
    "shapes_encoders_path",
    "shapes_pipeline_path",
]

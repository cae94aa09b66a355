"""What the tests of drawing and of its page ask for."""

from __future__ import annotations

from repagen.app.drawing import DrawingRequest

ORIGIN = {
    "model": {"path": "somewhere", "commit": None},
    "adapters": [],
    "recipe": None,
    "training_step": None,
    "dtype": "float32",
    "attention_backend": None,
}
REQUEST = DrawingRequest("tabby", 2, 5, 1.5, (0.0, 1.0), 3, 3)

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

from tiny_pipelines import ID2LABEL, tiny_pipeline


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline(id2label=ID2LABEL, sampling_defaults={"num_inference_steps": 5, "guidance_scale": 1.5})

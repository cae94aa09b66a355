from __future__ import annotations

from collections.abc import Callable

import pytest
from tiny_pipelines import tiny_pipeline

from repagen import ClassToImagePipeline, DiTDHTransformer2DModel, SiTTransformer2DModel


@pytest.fixture(params=[SiTTransformer2DModel, DiTDHTransformer2DModel], ids=["sit", "ditdh"])
def make_pipe(request) -> Callable[..., ClassToImagePipeline]:
    """Constructor of tiny pipelines, once for each generator."""
    return lambda **overrides: tiny_pipeline(request.param, **overrides)

from __future__ import annotations

import textwrap

import pytest

from repagen.export.modules import COMPONENTS, modules_needed, narrowed_components, rewritten

REWRITTEN = [
    ("from repagen.errors import UserError", "from . import errors\nUserError = errors.UserError"),
    (
        "from repagen.layers.norms import (\n    LayerNorm,\n    RMSNorm as Norm,\n)",
        "from . import layers_norms\nLayerNorm = layers_norms.LayerNorm\nNorm = layers_norms.RMSNorm",
    ),
    (
        "from repagen.models import encoder_storage",
        "from . import models_encoder_storage\nencoder_storage = models_encoder_storage",
    ),
    (
        "from repagen.pipelines.loading import CommitLoading",
        "from . import export_stand_ins\nCommitLoading = export_stand_ins.CommitLoading",
    ),
    (
        "from repagen.hub.published import PublishedMixin",
        "from . import export_stand_ins\nPublishedMixin = export_stand_ins.PublishedMixin",
    ),
    ("from diffusers import ModelMixin", "from diffusers import ModelMixin"),
    (
        "if TYPE_CHECKING:\n    from repagen.encoders import VisionEncoder",
        "if TYPE_CHECKING:\n    pass  # from repagen.encoders import VisionEncoder",
    ),
]


@pytest.mark.parametrize(("source", "expected"), REWRITTEN)
@pytest.mark.parametrize("indent", ["", "    "])
def test_imports_of_the_library_become_those_of_the_copy(source, expected, indent):
    start, end = ("def function():\n", "\n    return 1\n") if indent else ("x = 1\n", "\ny = 2\n")
    before = start + textwrap.indent(source, indent) + end
    assert rewritten(before) == start + textwrap.indent(expected, indent) + end


def test_what_is_left_out_says_how_it_is_had():
    source = "def encode():\n    from repagen.encoders import VisionEncoder\n\n    return VisionEncoder\n"
    names: dict = {}
    exec(rewritten(source), names)
    with pytest.raises(ImportError, match="import VisionEncoder: not in this self-contained copy"):
        names["encode"]()


def test_modules_are_followed_to_the_end():
    assert modules_needed(["repagen.flow.guidance"]) == ["repagen.errors", "repagen.flow.guidance"]
    needed = modules_needed(["repagen.models.transformer_sit"])
    assert {"repagen.layers.rope", "repagen.layers.caching", "repagen.errors"} <= set(needed)
    assert "repagen.models.transformer_dit" not in needed


def test_components_name_only_what_is_held():
    text = narrowed_components(["repagen.models.transformer_sit", "repagen.models.autoencoder_svg", COMPONENTS])
    assert "Transformer: TypeAlias = SiTTransformer2DModel\n" in text
    assert "Autoencoder: TypeAlias = SVGAutoencoder | AutoencoderKL | AutoencoderRAE\n" in text
    assert "Heun" not in text and "DDPMScheduler" in text

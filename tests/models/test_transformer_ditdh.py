"""`DiTDHTransformer2DModel` against the official DiT^DH, its guidance, and the published sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import GoldenCase
from torch.testing import assert_close
from transformer_cases import DITDH, build, inputs, output

from repagen import DiTDHTransformer2DModel
from repagen.flow.guidance import GuidanceInterval, guide

# Parameters with the frozen position table and frequencies, as counted on the official modules.
PUBLISHED = {"S": 196_455_764, "XL": 838_675_796}


@pytest.fixture
def case(golden: Path) -> Iterator[GoldenCase]:
    # The expected outputs were computed with several threads. With one, PyTorch takes other kernels, whose rounding
    # (4e-6 on outputs up to 14) the guidance scale multiplies.
    torch.set_num_threads(2)
    yield GoldenCase(golden / "ditdh", "ditdh")
    torch.set_num_threads(1)


@torch.no_grad()
def test_equals_the_official(case: GoldenCase) -> None:
    model = case.convert()
    for name, labels in (("out", case.labels), ("out_null", case.null_labels)):
        assert_close(model(case.x, case.t, labels).sample, case.expected[name], rtol=0, atol=1e-5)


@torch.no_grad()
def test_guidance_equals_the_official(case: GoldenCase) -> None:
    """Guidance multiplies the rounding of predictions, so it gets the official ones; ours are held to them above."""
    conditional = case.expected["out"]
    guided = guide(case.expected["out_null"], conditional, 2.5)
    assert_close(guided, case.expected["cfg"].chunk(2)[0], rtol=0, atol=1e-5)
    inside = torch.tensor([GuidanceInterval(0.2, 0.9).contains(t) for t in case.t.tolist()])
    windowed = torch.where(inside[:, None, None, None], guided, conditional)
    assert inside.tolist() == [False, True]
    assert_close(windowed, case.expected["cfg_interval"].chunk(2)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_autoguidance_equals_the_official(case: GoldenCase) -> None:
    good, bad = case.convert()(case.x, case.t, case.labels).sample, case.expected["autoguidance_bad_out"]
    inside = torch.tensor([GuidanceInterval(0.2, 0.9).contains(t) for t in case.t.tolist()])
    guided = torch.where(inside[:, None, None, None], guide(bad, good, 1.5), good)
    assert_close(guided, case.expected["autoguidance"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameters(size: str) -> None:
    with torch.device("meta"):
        model = DiTDHTransformer2DModel(**DiTDHTransformer2DModel.config_for_size(size))
    frozen = (model.pos_embed, model.time_embedder.frequencies)
    assert sum(tensor.numel() for tensor in (*model.parameters(), *frozen)) == PUBLISHED[size]


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": True},
        {"qk_norm": True, "use_rmsnorm": False},
        {"use_rmsnorm": False, "use_swiglu": False},
        {"use_rope": False},
        {"use_pos_embed": False},
        {"head_hidden_size": 32},
        {"patch_size": 2},
    ],
    ids=str,
)
def test_variants_save_load_and_differ(change: dict[str, Any], tmp_path: Path) -> None:
    model = build(DITDH, **change)
    model.save_pretrained(tmp_path)
    loaded = DiTDHTransformer2DModel.from_pretrained(tmp_path)
    result = output(model, DITDH)
    assert result.shape == inputs(DITDH)["hidden_states"].shape
    assert torch.equal(output(loaded, DITDH), result)
    assert not torch.allclose(result, output(build(DITDH), DITDH), atol=1e-3)


def test_random_frequencies_are_saved(tmp_path: Path) -> None:
    model = build(DITDH)
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    loaded = DiTDHTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.time_embedder.frequencies, model.time_embedder.frequencies)
    assert "time_embedder.frequencies" not in dict(model.named_parameters())


def test_positions_come_from_rope_alone_without_the_table() -> None:
    x = inputs(DITDH)["hidden_states"]
    blind = build(DITDH, use_rope=False, use_pos_embed=False)
    assert torch.allclose(output(blind, DITDH, hidden_states=x.flip(2)), output(blind, DITDH).flip(2), atol=1e-6)
    seeing = build(DITDH, use_pos_embed=False)
    assert not torch.allclose(
        output(seeing, DITDH, hidden_states=x.roll(1, 2)), output(seeing, DITDH).roll(1, 2), atol=1e-4
    )

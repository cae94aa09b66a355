"""A few steps of the benchmark of latents on shapes, through its own functions."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from repagen import TextToImagePipeline
from repagen.data.shards import LatentShards
from repagen.training import text_to_image

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
WIDTHS = "{hidden_size: 16, depth: 2, num_heads: 2, head_hidden_size: 32, head_depth: 1, head_num_heads: 2}"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.append(str(SCRIPTS))
    try:
        return importlib.import_module("shapes_latents")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def plan(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    shorter = ["max_steps=1", "global_batch_size=4", "data.num_images=8", "sample.every_steps=0"]
    return benchmark.Plan(
        tmp_path_factory.mktemp("latents"),
        steps=4,
        batch_size=4,
        num_images=16,
        points=2,
        num_prompts=2,
        num_inference_steps=2,
        num_reconstructions=4,
        autoencoder_words=shorter,
        words=[f"transformer.overrides={WIDTHS}"],
    )


@pytest.fixture(scope="module")
def autoencoders(benchmark: ModuleType, plan: Any) -> dict[str, Path]:
    return {name: benchmark.train_autoencoder(plan, name) for name in benchmark.LATENTS}


@pytest.fixture(scope="module")
def record(benchmark: ModuleType, plan: Any, autoencoders: dict[str, Path]) -> Any:
    return benchmark.compare(plan, [0, 1], autoencoders)


@pytest.mark.slow
def test_both_latents_are_scored_at_the_same_points(benchmark: ModuleType, plan: Any, record: Any) -> None:
    assert [(run["latent"], run["seed"]) for run in record["runs"]] == [
        ("RAE", 0), ("RAE", 1), ("VAE", 0), ("VAE", 1),
    ]  # fmt: skip
    for run in record["runs"]:
        assert list(run["curve"]) == ["8", "16"]
        assert all(0 <= share <= 1 for scores in run["curve"].values() for share in scores.values())
    assert {name: facts["latent"] for name, facts in record["autoencoders"].items()} == {
        "RAE": [96, 4, 4],
        "VAE": [4, 8, 8],
    }
    assert [run["shift"] for run in record["runs"]] == pytest.approx([6**0.5] * 2 + [1.0] * 2)
    with Image.open(plan.output / "curves.png") as picture:
        assert picture.width > 300


@pytest.mark.slow
def test_both_generators_see_the_same_and_differ_at_their_ends_alone(plan: Any, record: Any) -> None:
    shards = [LatentShards(plan.output / f"latents-{name}", verify=False) for name in ("RAE", "VAE")]
    assert len({one.manifest["dataset"]["fingerprint"] for one in shards}) == 1
    networks = [
        TextToImagePipeline.from_pretrained(plan.output / f"generator-{name}-0-4" / "pipeline").transformer
        for name in ("RAE", "VAE")
    ]
    shapes = [{name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} for network in networks]
    assert shapes[0].keys() == shapes[1].keys()
    other = {name for name in shapes[0] if shapes[0][name] != shapes[1][name]}
    assert other and all("patch_embed" in name or "embedder" in name or name.startswith("proj_out") for name in other)
    assert networks[0].token_grid == networks[1].token_grid == (4, 4)


@pytest.mark.slow
def test_a_finished_part_is_not_run_again(
    benchmark: ModuleType, plan: Any, record: Any, autoencoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_to_image, "train", None)
    monkeypatch.setattr(benchmark.decoder, "train", None)
    assert {name: benchmark.train_autoencoder(plan, name) for name in benchmark.LATENTS} == autoencoders
    assert benchmark.compare(plan, [0, 1], autoencoders) == record
    with pytest.raises(TypeError):  # other steps are another run
        benchmark.compare(replace(plan, steps=6), [0], autoencoders)


def test_seeds_are_averaged_and_spread(benchmark: ModuleType) -> None:
    curves = [{"64": {"x": value}} for value in (0.5, 0.6, 0.58)]
    assert benchmark.over_seeds(curves, "x")[64] == pytest.approx((0.56, 0.5, 0.6))
    table = benchmark.table({"RAE, one object": {64: [0.5, 0.25, 0.75]}})
    assert "| RAE, one object | 50.0 (25 to 75) |" in table


def test_reconstructions_are_read(benchmark: ModuleType, tmp_path: Path) -> None:
    from repagen.models.autoencoder_pixel import PixelAutoencoder

    PixelAutoencoder(32).save_pretrained(tmp_path)
    facts = benchmark.reconstruction_facts(tmp_path, num_images=5)
    assert facts["reconstructions_right"] == 1 and facts["psnr_db"] > 60

"""Every preset of a generator: its sizes on the meta device, and one training step with reduced widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generator_parts import TINY, new_model, write_parts

from repagen.cli import COMMANDS
from repagen.config import load_config, preset_names, read_preset
from repagen.conversion.recipes import OFFICIAL_FAMILIES
from repagen.flow.time import TimeShift
from repagen.layers.embeddings import FourierTimeEmbedding
from repagen.pipelines.sampling_options import SamplingOptions
from repagen.schedulers.presets import SAMPLER_PRESETS
from repagen.training import recipes_command
from repagen.training.generator import train
from repagen.training.generator_config import GeneratorConfig
from repagen.training.generator_loop import time_distribution
from repagen.training.log import read_metrics

SD_VAE, RAE = (4, 32, 32), (768, 16, 16)
LEARNED_VARIANCE = 16 * 1153  # weights of SiT-XL/2's unused second half of channels, which new models do not have
SIT_XL = 675_129_632 - LEARNED_VARIANCE
# Preset => latent shape, parameters of the official code (as published, tables included) less what new models leave
# out, alpha of the time shift.
IMAGENET: dict[str, tuple[tuple[int, int, int], int, float]] = {
    "dit_xl_2": (SD_VAE, 675_129_632, 1.0),
    "sit_xl_2": (SD_VAE, SIT_XL, 1.0),
    "sit_b_repa": (SD_VAE, 130_512_416 - 16 * 769, 1.0),
    "sit_xl_repa": (SD_VAE, SIT_XL, 1.0),
    "sit_xl_irepa": (SD_VAE, SIT_XL, 1.0),
    "sit_xl_haste": (SD_VAE, SIT_XL, 1.0),
    "sit_xl_reg": (SD_VAE, SIT_XL + 768 * 1152 + 1152 + 768 * 1153, 1.0),  # linear layers of the class token
    "sit_xl_sra": (SD_VAE, SIT_XL, 1.0),
    "sit_xl_dispersive": (SD_VAE, SIT_XL, 1.0),
    "lightningdit_xl": ((32, 16, 16), 675_256_736, 1.0),
    "rae_lightningdit_xl": (RAE, 677_248_384, 6.928),
    "ditdh_s_256": (RAE, 196_455_764, 6.928),
    "ditdh_xl_256": (RAE, 838_675_796, 6.928),
    "ditdh_xl_512": ((768, 32, 32), 838_675_796 + 768 * 1152, 13.856),
    "raev2_xl": ((1024, 16, 16), 875_216_500, 8.0),
    "svg_xl": ((392, 16, 16), 676_437_904 - 392 * 1153, 2.5),
    "ddt_xl": (SD_VAE, 674_646_352, 1.0),
}
UNPUBLISHED = {"elt_xl": (SD_VAE, 4 * 7, 28)}  # loops times blocks are SiT-XL's depth
GENERATORS = [*IMAGENET, *UNPUBLISHED, "digits_generator"]
PLACES = ["data.path=unused", "autoencoder.path=unused"]
# Preset => the official family whose sampling it releases.
FAMILIES = {
    "dit_xl_2": "dit",
    "sit_xl_2": "sit",
    "sit_xl_repa": "sit_repa",
    "lightningdit_xl": "lightningdit",
    "rae_lightningdit_xl": "rae_lightningdit",
    "ditdh_xl_256": "ditdh",
    "ditdh_xl_512": "ditdh",
    "raev2_xl": "raev2_ditdh",
    "svg_xl": "svg_dit",
    "ddt_xl": "ddt",
}


def test_these_are_all_generator_presets() -> None:
    assert {name for name in preset_names() if read_preset(name)["recipe"]["program"] == "generator"} == {*GENERATORS}


def parameters_with_tables(model: Any) -> int:
    """As official code counts: fixed positions and frequencies are frozen parameters there."""
    tables = [model.pos_embed] if getattr(model, "pos_embed", None) is not None else []
    if isinstance(model.time_embedder, FourierTimeEmbedding):
        tables += list(model.time_embedder.buffers())
    return sum(tensor.numel() for tensor in [*model.parameters(), *tables])


@pytest.mark.parametrize("name", IMAGENET)
def test_sizes_are_the_published_ones(name: str) -> None:
    shape, parameters, alpha = IMAGENET[name]
    config = load_config(GeneratorConfig, name, PLACES)
    with torch.device("meta"):
        model = new_model(config, shape, 1000, class_token_dim=768 if config.alignment.class_token else 0)
    assert parameters_with_tables(model) == parameters
    assert time_distribution(config, shape).shift.alpha == pytest.approx(alpha, abs=1e-3)


def test_a_looped_network_has_the_depth_of_sit_xl_in_fewer_weights() -> None:
    config = load_config(GeneratorConfig, "elt_xl", PLACES)
    with torch.device("meta"):
        model = new_model(config, SD_VAE, 1000)
    assert model.config.depth * model.config.num_loops == 28
    assert SIT_XL / 4.5 < sum(p.numel() for p in model.parameters()) < SIT_XL / 3.5


@pytest.mark.parametrize("size", ["S", "B", "L"])
@pytest.mark.parametrize("name", ["sit_xl_2", "dit_xl_2"])
def test_other_sizes_are_one_word_away(name: str, size: str) -> None:
    published = {"S": 32_963_360, "B": 130_512_416, "L": 458_102_816}[size]
    config = load_config(GeneratorConfig, name, [*PLACES, f"transformer.size={size}"])
    with torch.device("meta"):
        model = new_model(config, SD_VAE, 1000)
    unused = 0 if name == "dit_xl_2" else 16 * (model.config.hidden_size + 1)
    assert parameters_with_tables(model) == published - unused


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_release_the_sampling_of_the_official_checkpoints(name: str) -> None:
    config = load_config(GeneratorConfig, name, PLACES)
    shape = IMAGENET[name][0]
    with torch.device("meta"):
        model = new_model(config, shape, 1000)
    recipe = OFFICIAL_FAMILIES[FAMILIES[name]].recipe(model.config)
    assert config.sampler.preset == recipe.preset
    steps = SAMPLER_PRESETS[recipe.preset].num_inference_steps
    ours = SamplingOptions.resolve(config.sampler.defaults, {})
    assert ours == SamplingOptions.resolve({"num_inference_steps": steps, **recipe.guidance}, {})
    shift = SAMPLER_PRESETS[recipe.preset].shift
    if shift is not None:
        released = config.sampler.shift or config.flow.time_shift(shape).alpha
        assert released == pytest.approx(TimeShift.for_latent_shape(shape).alpha if recipe.shift_by_latent else shift)


@pytest.mark.parametrize("name", GENERATORS)
def test_presets_describe_themselves(name: str) -> None:
    recipe = load_config(GeneratorConfig, name, PLACES).recipe
    assert all((recipe.title, recipe.paper, recipe.cost, recipe.expected))


def test_the_learning_rate_of_rae_falls_after_epoch_40_to_a_tenth_at_epoch_800() -> None:
    from repagen.training.optimizer import learning_rate

    config = load_config(GeneratorConfig, "ditdh_xl_256", PLACES)
    epoch_steps = 1_281_167 / 1024
    rates = [
        learning_rate(config.optimizer, round(epoch * epoch_steps), config.max_steps) for epoch in (0, 40, 420, 800)
    ]
    assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5], rel=1e-3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


def small(name: str, parts: Path, output: Path) -> list[str]:
    """Words that shrink a preset to the digits: widths, places and blocks; everything else stays the recipe's."""
    preset: dict[str, Any] = read_preset(name)
    _, widths = TINY[preset["transformer"]["architecture"]]
    representation = name in ("svg_xl", "digits_generator") or "rae" in preset["autoencoder"]["path"].lower()
    values = {
        "output_dir": output,
        "max_steps": 1,
        "global_batch_size": 4,
        "num_workers": 0,
        "device": "cpu",
        "progress_bar": "false",
        "data.kind": "digits",
        "data.image_size": 32,
        "data.horizontal_flip": "false",
        "autoencoder.path": parts / ("rae" if representation else "kl"),
        "sample.num_images": 2,
        "sample.every_steps": 1,
        "sampler.num_inference_steps": 3,
        **{f"transformer.overrides.{key}": value for key, value in widths.items()},
    }
    alignment = preset.get("alignment", {})
    if "targets" in alignment:
        values |= {"alignment.targets.0.encoder": parts / "encoder", "alignment.targets.0.block": 2}
    if "attention" in alignment:
        values |= {"alignment.attention.encoder": parts / "encoder"}
        values |= {"alignment.attention.layers": [0], "alignment.attention.blocks": [2]}
    if "class_token" in alignment:
        values |= {"alignment.class_token.encoder": parts / "encoder"}
    if "self_alignment" in alignment:
        values |= {"alignment.self_alignment.block": 1, "alignment.self_alignment.teacher_block": 2}
    if "dispersive" in alignment:
        values |= {"alignment.dispersive.block": 1}
    return [f"{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("name", GENERATORS)
def test_one_training_step_of_each_preset(name: str, parts: Path, tmp_path: Path) -> None:
    config = load_config(GeneratorConfig, name, small(name, parts, tmp_path / "run"))
    pipeline = train(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1]
    assert {f"loss_{term}" for term in config.alignment.schedules} <= rows[0].keys()
    assert (pipeline / "model_index.json").is_file()
    assert [path.name for path in (tmp_path / "run").rglob("model_index.json")] == ["model_index.json"]
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()


def test_recipes_lists_every_preset_with_its_command() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    recipes_command.add_arguments(parser)
    listing = recipes_command.run(parser.parse_args([]))
    for name in preset_names():
        assert f"--config {name}" in listing
        assert recipes_command.run(parser.parse_args([name])).startswith("#")
    assert COMMANDS["recipes"][0] == recipes_command.__name__

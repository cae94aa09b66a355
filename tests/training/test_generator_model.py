"""Networks to go on from: what they keep, what must agree, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_parts import SIT_WIDTHS, metric_rows, new_model, tiny_settings, train_settings, write_parts
from golden_cases import GoldenCase
from safetensors.torch import load_file

import repagen
from repagen import (
    ClassToImagePipeline,
    DiTDHTransformer2DModel,
    SiTTransformer2DModel,
    convert_checkpoint,
    export_checkpoint,
    sampler_preset,
)
from repagen.config import load_config
from repagen.errors import UserError
from repagen.models.opening import component_config, open_component
from repagen.training.generator_config import GeneratorConfig
from repagen.training.generator_model import refuse_other_autoencoder, token_grid

SHAPE = (16, 4, 4)


def official_sit(folder: Path, **overrides: Any) -> Any:
    """A network as converted from SiT's files: its time runs backwards, and it has 1,000 classes."""
    torch.manual_seed(0)
    model: Any = SiTTransformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=16,
        **SIT_WIDTHS,
        **{"learn_sigma": True, "time_direction": "data_at_one", "num_classes": 10, **overrides},
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def config(folder: Path, *words: str) -> GeneratorConfig:
    (folder / "empty.yaml").write_text("")
    given = ["output_dir=x", "max_steps=1", "global_batch_size=1", "data.path=x", "autoencoder.path=x"]
    return load_config(GeneratorConfig, folder / "empty.yaml", [*given, *words])


def build(folder: Path, *words: str, num_classes: int = 10, shape: tuple[int, int, int] = SHAPE) -> Any:
    return new_model(config(folder, f"transformer.pretrained={folder / 'sit'}", *words), shape, num_classes)


def test_weights_direction_and_prediction_are_the_pretrained_ones(tmp_path: Path) -> None:
    official = official_sit(tmp_path / "sit")
    model = build(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(official.parameters(), model.parameters(), strict=True))
    assert model.config.time_direction == "data_at_one" and model.config.learn_sigma
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    "words",
    [
        ["transformer.architecture=sit", "transformer.patch_size=1", "transformer.prediction=velocity"],
        ["transformer.overrides={hidden_size: 16, num_heads: 2}"],
        ["transformer.architecture=sit", "transformer.size=S", f"transformer.overrides={SIT_WIDTHS}"],
    ],
)
def test_what_agrees_may_be_said(tmp_path: Path, words: list[str]) -> None:
    official_sit(tmp_path / "sit")
    build(tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transformer.architecture=ditdh"], r"transformer.architecture: ditdh .*is a SiTTransformer2DModel"),
        (
            ["transformer.architecture=sit", "transformer.size=B"],
            r"transformer.size: .*hidden_size=768.*has 16",
        ),
        (["transformer.patch_size=2"], r"transformer.patch_size: asks for patch_size=2.*has 1"),
        (["transformer.prediction=sample"], r"transformer.prediction: asks for prediction_type='sample'"),
        (["transformer.overrides={depth: 3}"], r"transformer.overrides.depth: asks for depth=3.*has 2"),
        (["transformer.overrides={dept: 3}"], r"transformer.overrides.dept: unknown; known: .*depth"),
    ],
)
def test_what_contradicts_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    official_sit(tmp_path / "sit")
    with pytest.raises(UserError, match=message):
        build(tmp_path, *words)


def test_other_latents_and_other_classes_are_refused(tmp_path: Path) -> None:
    official_sit(tmp_path / "sit")
    with pytest.raises(UserError, match=r"latents of shape \(16, 4, 4\), but the autoencoder's have \(4, 8, 8\)"):
        build(tmp_path, shape=(4, 8, 8))
    with pytest.raises(UserError, match=r"has 10 classes, the dataset 3; set transformer.new_classes=true"):
        build(tmp_path, num_classes=3)


def test_a_network_without_null_class_cannot_drop_labels(tmp_path: Path) -> None:
    official_sit(tmp_path / "sit", class_dropout_prob=0.0)
    with pytest.raises(UserError, match=r"label_dropout: 0.1, but .* has no null class; set it to 0"):
        build(tmp_path)
    build(tmp_path, "label_dropout=0")


def test_new_classes_keep_everything_but_the_class_embeddings(tmp_path: Path) -> None:
    official = official_sit(tmp_path / "sit")
    model = build(tmp_path, "transformer.new_classes=true", num_classes=3)
    assert model.config.num_classes == 3 and model.config.time_direction == "data_at_one"
    own, new = official.state_dict(), model.state_dict()
    table = "label_embedder.table.weight"
    assert new[table].shape == (4, 16) and torch.equal(new[table][-1], own[table][-1])
    assert not any(torch.equal(row, old) for row in new[table][:-1] for old in own[table])
    assert all(torch.equal(new[name], own[name]) for name in own if name != table)


def test_sources_are_pipelines_or_networks_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"transformer.pretrained: no such folder"):
        build(tmp_path)
    (tmp_path / "sit").mkdir()
    with pytest.raises(UserError, match=r"transformer.pretrained: .* cannot be loaded"):
        build(tmp_path)
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "sit")
    message = r"^transformer.pretrained: .* is a AutoencoderKL; allowed: SiTTransformer2DModel.*or a pipeline"
    with pytest.raises(UserError, match=message):
        build(tmp_path)
    with pytest.raises(UserError, match=message):  # what reads the patch's size comes first in training
        token_grid(config(tmp_path, f"transformer.pretrained={tmp_path / 'sit'}").transformer, SHAPE)


def test_the_grid_of_a_pipelines_network_is_read_after_its_autoencoder_was_opened(tmp_path: Path) -> None:
    pipeline = str(Path(repagen.__file__).parent / "data" / "shapes_pipeline")
    autoencoder: Any = open_component(pipeline, "vae", "autoencoder.path")
    transformer = config(tmp_path, f"transformer.pretrained={pipeline}").transformer
    patch_size = component_config(pipeline, "transformer", "transformer.pretrained")["patch_size"]
    shape = (autoencoder.latent_shape[0], 4 * patch_size, 6 * patch_size)
    assert token_grid(transformer, shape) == (4, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transformer.revision=main"], "transformer.revision: must be left out without transformer.pretrained"),
        (["transformer.new_classes=true"], "transformer.new_classes: must be left out"),
        (["transformer.pretrained=x", "transformer.size=XL"], "transformer.size: must be left out, or given together"),
        (["transformer.architecture=raev2"], "transformer.size: RAEv2Transformer2DModel: no size 'S'; allowed are XL"),
        (
            ["transformer.architecture=dit", "transformer.prediction=velocity"],
            "prediction: must be epsilon",
        ),
        (["transformer.prediction=epsilon"], "transformer.prediction: must be velocity or sample"),
        (["transformer.overrides={class_token_dim: 8}"], "overrides.class_token_dim: cannot be set here"),
    ],
)
def test_contradictions_within_the_configuration_are_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(tmp_path, *words)


def test_a_new_network_predicts_what_its_class_says(tmp_path: Path) -> None:
    found = {}
    for architecture, size in (("sit", "S"), ("dit", "S"), ("raev2", "XL")):
        with torch.device("meta"):
            words = [f"transformer.architecture={architecture}", f"transformer.size={size}"]
            found[architecture] = new_model(config(tmp_path, *words), SHAPE, 10).config.prediction_type
    assert found == {"sit": "velocity", "dit": "epsilon", "raev2": "sample"}
    with torch.device("meta"):
        assert isinstance(new_model(config(tmp_path), SHAPE, 10), DiTDHTransformer2DModel)


def test_a_released_pipeline_is_fine_tuned_at_once(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    values = tiny_settings(parts, tmp_path, "sit")
    values["max_steps"] = 2
    first = train_settings(values, tmp_path / "first")
    values["transformer"] = {"pretrained": str(first / "pipeline")}
    values["optimizer"]["learning_rate"] = 1e-12
    tuned = train_settings(values, tmp_path / "tuned")
    before, after = (ClassToImagePipeline.from_pretrained(run / "pipeline").transformer for run in (first, tuned))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    # The same batches at the released weights: the loss is that of the pretrained network, not of a new one.
    assert metric_rows(tuned)[0]["loss"] != pytest.approx(metric_rows(first)[0]["loss"], rel=1e-6)


def test_a_backward_network_learns_the_librarys_velocity(tmp_path: Path) -> None:
    """Its output is negated and its time mirrored at one place, so that its loss is that of -official(x_t, 1 - t)."""
    parts = write_parts(tmp_path / "parts")
    official_sit(tmp_path / "sit")
    model = official_sit(tmp_path / "forward", time_direction="data_at_zero")
    x, t = torch.randn(3, *SHAPE), torch.tensor([0.1, 0.5, 0.9])
    labels = torch.tensor([1, 2, 10])
    backward: Any = SiTTransformer2DModel.from_pretrained(tmp_path / "sit")
    assert torch.allclose(backward(x, t, labels).sample, -model(x, 1 - t, labels).sample, atol=1e-5)
    values = tiny_settings(parts, tmp_path, "sit")
    values |= {"max_steps": 1, "transformer": {"pretrained": str(tmp_path / "sit")}}
    assert metric_rows(train_settings(values, tmp_path / "run"))[0]["loss"] > 0


@pytest.mark.parametrize("family", ["sit", "dit", "sit_repa"])
def test_a_converted_model_is_fine_tuned_at_once_and_exported_back(golden: Path, tmp_path: Path, family: str) -> None:
    case = GoldenCase(golden / family, family)
    case.convert().save_pretrained(tmp_path / "converted")
    values = tiny_settings(write_parts(tmp_path / "parts"), tmp_path, "dit" if family == "dit" else "sit")
    values["autoencoder"]["path"] = str(tmp_path / "parts" / "kl")
    values |= {"max_steps": 2, "transformer": {"pretrained": str(tmp_path / "converted")}}
    run = train_settings(values, tmp_path)
    tuned = ClassToImagePipeline.from_pretrained(run / "pipeline").transformer
    exported = tmp_path / "tuned.safetensors"
    export_checkpoint(tuned, family, exported)
    before, after = load_file(case.weights_path), load_file(exported)
    assert after.keys() == {name for name in before if not name.startswith("projectors.")}
    assert {name: tensor.shape for name, tensor in after.items()} == {name: before[name].shape for name in after}
    assert torch.equal(after["pos_embed"], before["pos_embed"])
    assert not torch.equal(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    back: Any = convert_checkpoint(family, exported, case.config)
    with torch.no_grad():
        again = back(case.x, case.t, class_labels=case.labels).sample
        assert torch.equal(again, tuned(case.x, case.t, class_labels=case.labels).sample)


def test_a_pretrained_network_may_learn_a_class_token(tmp_path: Path) -> None:
    official = official_sit(tmp_path / "sit")
    model = new_model(config(tmp_path, f"transformer.pretrained={tmp_path / 'sit'}"), SHAPE, 10, class_token_dim=8)
    own, new = official.state_dict(), model.state_dict()
    assert model.config.class_token_dim == 8 and own.keys() < new.keys()
    assert all(torch.equal(new[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sampler.guidance_channels=0", r"command line:sampler\.guidance_channels: is 0; give .*at least 1"),
        ("sampler.guidance_interval=[0.9, 0.1]", r"command line:sampler\.guidance_interval: is \(0\.9, 0\.1\); give"),
        ("alignment.schedule.weight=-1", r"command line:alignment\.schedule\.weight: the weight .* got -1\.0"),
    ],
)
def test_the_command_line_is_blamed_for_its_own_values(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(tmp_path, word)
    assert re.match(message, str(caught.value)) and not str(caught.value).endswith((":", ": "))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["architecture=sit", "size=S", "overrides={hidden_size: 30}"],
            "overrides.hidden_size, .*overrides.num_heads",
        ),
        (["architecture=raev2", "size=XL", "overrides={base_depth: 99}"], r"^transformer.overrides.base_depth: "),
        (["architecture=ditdh", "overrides={head_num_heads: 7}"], "^transformer.overrides.head_hidden_size, "),
        (
            ["architecture=lightningdit", "size=B", "overrides={mlp_ratio: 0.001}"],
            "^transformer.overrides.mlp_ratio: ",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_their_keys(tmp_path: Path, words: list[str], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        new_model(config(tmp_path, *(f"transformer.{word}" for word in words)), SHAPE, 10)


@pytest.mark.parametrize(
    "word",
    [
        "flow.time=logit_normal", "flow.mean=1", "flow.std=2", "flow.maximum=0.9", "flow.shift=3", "loss.direction=1",
        "loss.base=2", "loss.distillation=2",
    ],
)  # fmt: skip
def test_what_a_ddpm_takes_no_notice_of_is_refused(tmp_path: Path, word: str) -> None:
    key = word.split("=")[0]
    with torch.device("meta"), pytest.raises(UserError, match=f"^{key}: .* has no effect, DDPMDiT"):
        new_model(config(tmp_path, "transformer.architecture=dit", word), SHAPE, 10)


def pipeline_folder(folder: Path, transformer: Any, vae: Path) -> Path:
    from repagen.training.latent_identity import open_autoencoder

    scheduler: Any = sampler_preset("repa-ode")[0]
    ClassToImagePipeline(transformer, open_autoencoder(str(vae)), scheduler).save_pretrained(folder)
    return folder


def test_a_pipelines_autoencoder_is_compared_with_that_of_the_training(tmp_path: Path) -> None:
    from repagen.models.identity import describe_autoencoder
    from repagen.training.latent_identity import open_autoencoder

    rae = write_parts(tmp_path) / "rae"
    folder = pipeline_folder(tmp_path / "pipeline", official_sit(tmp_path / "sit"), rae)
    autoencoder = open_autoencoder(str(rae))
    given = config(tmp_path, f"transformer.pretrained={folder}")
    refuse_other_autoencoder(given, describe_autoencoder(autoencoder) | {"name": "moved elsewhere"})
    autoencoder.latents_mean.add_(1)
    with pytest.raises(UserError, match=r"^autoencoder.path: x has other latents .*\(another statistics\); set"):
        refuse_other_autoencoder(given, describe_autoencoder(autoencoder))
    alone = config(tmp_path, f"transformer.pretrained={folder / 'transformer'}")
    refuse_other_autoencoder(alone, describe_autoencoder(autoencoder))

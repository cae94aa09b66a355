"""Training of an AutoencoderKL: its whole loss, splits, restarts, statistics in closed form, releases."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from decoder_parts import rows, settings, train_in_sizes, words, write_parts
from diffusers import AutoencoderKL
from folders import folder_bytes

from repagen import UserError, images_to_latents
from repagen.config import load_config
from repagen.data import open_dataset
from repagen.randomness import generator_for
from repagen.training.decoder import KINDS, build_loss_networks, train
from repagen.training.decoder_config import DecoderConfig
from repagen.training.decoder_kl import build_kl
from repagen.training.decoder_step import DecoderStep
from repagen.training.discriminator import adaptive_weight, hinge_loss
from repagen.training.run import open_run

PLACES = ("autoencoder.encoder", "autoencoder.decoder", "autoencoder.decoder_patch_size", "adversarial.backbone")


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def configured(parts, tmp_path):
    """The published preset with tiny widths and all gates within a few steps; keywords with __ for dots override."""

    def build(**changes) -> DecoderConfig:
        values = {
            **{key: value for key, value in settings(parts).items() if key not in PLACES},
            "autoencoder.kl.widths": "[8, 8]",
            "autoencoder.kl.blocks": 1,
            "autoencoder.kl.norm_groups": 4,
            "autoencoder.kl.weight": 1e-3,
            "output_dir": tmp_path / "run",
            "max_steps": 4,
            "global_batch_size": 8,
            "micro_batch_size": "null",
            "checkpoint.every_steps": 100,
            "sample.every_steps": 0,
            "statistics": "false",
            "adversarial.patch_width": 4,
            "adversarial.patch_layers": 2,
            "adversarial.norm_samples": 2,
            "adversarial.adaptive_maximum": 1e4,
            "adversarial.discriminator_start_step": 1,
            "adversarial.start_step": 2,
            "optimizer.learning_rate": 0.001,
            "adversarial.optimizer.learning_rate": 0.001,
            "ema.decay": 0.5,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return load_config(DecoderConfig, "kl_f8", words(values))

    return build


def test_published_network():
    config = load_config(DecoderConfig, "kl_f8", ["data.path=unused"])
    with torch.device("meta"):
        autoencoder = build_kl(config.autoencoder.kl)
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863  # SD-VAE
    values = 3 * 256 * 256
    assert config.autoencoder.kl.weight * values == pytest.approx(1e-6, rel=1e-4)
    assert config.adversarial.adaptive_maximum * values == pytest.approx(1e4, rel=1e-4)
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * config.global_batch_size)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_step_equals_the_formulas_written_out(configured, adaptive):
    config = configured(
        adversarial__discriminator_start_step=0, adversarial__start_step=0, adversarial__adaptive=str(adaptive).lower()
    )
    with open_run(config, "decoder") as run:
        kind = KINDS["kl"].open(config, run)
        perceptual, discriminator = build_loss_networks(config.lpips, config.adversarial)
        step = DecoderStep(run, config, kind, open_dataset(config.data), perceptual, discriminator)
        _, micro_batches = next(run.steps(step.dataset, 0))
        (batch,) = micro_batches
        twin, judge, images = deepcopy(kind.autoencoder), deepcopy(discriminator), batch["image"]
        gradients = []
        step.optimizer.register_step_pre_hook(
            lambda *_: gradients.extend(p.grad.clone() for p in kind.trained.parameters())
        )
        row = step(0, iter([batch]))

    noise = torch.stack([torch.randn(4, 16, 16, generator=generator_for(0, "posterior", i)) for i in range(8)])
    posterior = twin.encode(2 * images - 1).latent_dist
    output = twin.decode(posterior.mean + posterior.std * noise).sample / 2 + 0.5
    reconstruction = 2.0 * (output - images).abs().mean() + perceptual(output, images).mean()
    adversarial = -judge(output).mean()
    last = twin.decoder.conv_out.weight
    both = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    weight = adaptive_weight(*both, epsilon=1e-4) if adaptive else torch.tensor(1.0)
    loss = reconstruction + 0.5 * weight * adversarial + 1e-3 * posterior.kl().mean()
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["kl"] == pytest.approx(posterior.kl().mean().item(), rel=1e-5)
    assert row.get("adaptive_weight") == (pytest.approx(weight.item(), rel=1e-4) if adaptive else None)
    for ours, parameter in zip(gradients, twin.parameters(), strict=True):
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5 * scale + 1e-7, rtol=1e-3)
    with torch.no_grad():
        assert row["discriminator"] == pytest.approx(hinge_loss(judge(images), judge(output)).item(), rel=1e-5)


def test_accumulation_equals_the_large_batch(configured, tmp_path):
    changes = {"adversarial__discriminator_start_step": 0, "adversarial__start_step": 0, "max_steps": 1}
    whole = configured(output_dir=tmp_path / "whole", **changes)
    split = configured(output_dir=tmp_path / "split", micro_batch_size=2, **changes)
    train(whole)
    train(split)
    (one,), (four,) = rows(whole), rows(split)
    assert one.keys() == four.keys() and "adaptive_weight" in one
    for name in one:
        assert four[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name


def test_sizes_train_in_turns(configured, tmp_path):
    gates = {"adversarial__discriminator_start_step": 0, "adversarial__start_step": 1}
    train_in_sizes(train, configured, tmp_path, **gates)


def test_a_continued_run_equals_an_uninterrupted_one(configured, tmp_path):
    through = configured(output_dir=tmp_path / "through", max_steps=5)
    halved = configured(output_dir=tmp_path / "halved", max_steps=3)
    train(through)
    train(halved)
    train(configured(output_dir=tmp_path / "halved", max_steps=5))
    assert rows(through) == rows(halved)
    for place in ("autoencoder", "checkpoints/step-00000005"):
        one, two = (folder_bytes(tmp_path / name / place) for name in ("through", "halved"))
        assert {k: v for k, v in one.items() if k.endswith("safetensors")} == {
            k: v for k, v in two.items() if k.endswith("safetensors")
        }


def test_released_latents_are_standardised_over_data_and_posterior(configured, tmp_path):
    folder = train(configured(statistics="true", max_steps=1, sample__every_steps=1, data__subset="validation"))
    autoencoder = AutoencoderKL.from_pretrained(folder)
    assert len(autoencoder.config.latents_mean) == len(autoencoder.config.latents_std) == 4
    assert autoencoder.config.scaling_factor == 1.0
    dataset = open_dataset(configured(data__subset="validation").data)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    latents = images_to_latents(autoencoder, images, generator=torch.Generator().manual_seed(0))
    assert latents.mean((0, 2, 3)).abs().max() < 1e-2  # of 90,880 draws
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()


@pytest.mark.parametrize("change", [{"gradient_checkpointing": "true"}, {"precision": "bf16"}])
def test_memory_and_precision_settings_give_the_same_losses(configured, tmp_path, change):
    plain, changed = configured(output_dir=tmp_path / "plain"), configured(output_dir=tmp_path / "changed", **change)
    train(plain)
    train(changed)
    for one, two in zip(rows(plain), rows(changed), strict=True):
        assert two["l1"] == pytest.approx(one["l1"], rel=1e-5 if "precision" not in change else 0.05)


def test_without_statistics_the_scaling_factor_is_released(configured, tmp_path):
    folder = train(configured(max_steps=1, autoencoder__kl__scaling_factor=0.5, adversarial__weight=0))
    autoencoder = AutoencoderKL.from_pretrained(folder)
    assert autoencoder.config.scaling_factor == 0.5 and autoencoder.config.latents_mean is None
    second = configured(
        output_dir=tmp_path / "second", max_steps=1, autoencoder__pretrained=folder, adversarial__weight=0
    )
    train(second)
    assert rows(second)[0]["l1"] != rows(configured())[0]["l1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder__encoder": "digits"}, r"autoencoder\.encoder: must be left out"),
        ({"autoencoder__noise_tau": 0.5}, r"autoencoder\.noise_tau: has no effect with kind=kl"),
        ({"autoencoder__kl__widths": "[6]"}, r"autoencoder\.kl\.widths: must be positive multiples of norm_groups=4"),
        ({"adversarial__norm_samples": 0}, r"adversarial\.norm_samples"),
        ({"l1_weight": 0}, r"l1_weight"),
    ],
)
def test_wrong_settings_are_named(configured, changes, message):
    with pytest.raises(UserError, match=message):
        configured(**changes)


def test_wrong_sources_are_named(configured, parts, tmp_path):
    with pytest.raises(UserError, match=r"norm_samples"):
        train(configured(micro_batch_size=1, adversarial__start_step=0))
    with pytest.raises(UserError, match=r"data\.image_size|image_size: 33 px"):
        train(configured(output_dir=tmp_path / "odd", data__image_size=33))

"""Training of SVG's autoencoder: matching over the whole batch, keyed masks and dropout, splits, restarts, release."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from decoder_parts import rows, run_two_processes, settings, train_in_sizes, words, write_parts
from folders import folder_bytes
from safetensors.torch import load_file

from repagen import UserError
from repagen.config import load_config, save_config
from repagen.data import open_dataset
from repagen.models.autoencoder_svg import SVGAutoencoder
from repagen.randomness import generator_for
from repagen.training.decoder import KINDS, build_loss_networks, train
from repagen.training.decoder_config import DecoderConfig
from repagen.training.decoder_step import DecoderStep
from repagen.training.discriminator import adaptive_weight
from repagen.training.run import open_run

TINY = {
    "residual_channels": 4,
    "residual_hidden_size": 16,
    "residual_num_layers": 1,
    "residual_num_heads": 2,
    "residual_intermediate_size": 16,
    "decoder_up_block_types": "[AttnUpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D, UpDecoderBlock2D]",
    "decoder_block_out_channels": "[8, 8, 8, 8]",
    "decoder_layers_per_block": 1,
    "norm_num_groups": 4,
    "mask_probability": 0.4,
    "dropout_samples": 2,
}


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def configured(parts, tmp_path):
    """The published preset with tiny widths and all gates within a few steps; keywords with __ for dots override."""

    def build(**changes) -> DecoderConfig:
        places = ("autoencoder.decoder", "autoencoder.decoder_patch_size", "adversarial.backbone")
        values = {
            **{key: value for key, value in settings(parts).items() if key not in places},
            **{f"autoencoder.svg.{key}": value for key, value in TINY.items()},
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
            "ema.decay": 0.5,
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return load_config(DecoderConfig, "svg_autoencoder", words(values))

    return build


def test_published_sizes():
    config = load_config(DecoderConfig, "svg_autoencoder", ["data.path=unused"])
    settings_of = {key: value for key, value in vars(config.autoencoder.svg).items() if key != "dropout_samples"}
    with torch.device("meta"):
        autoencoder = SVGAutoencoder(encoder_channels=384, **settings_of)
    parameters = {name: sum(p.numel() for p in child.parameters()) for name, child in autoencoder.named_children()}
    assert parameters["decoder"] == 43_076_483  # 43.1M
    assert 11_000_000 < parameters["residual_encoder"] < 11_300_000  # about 11M
    assert autoencoder.latent_shape == (392, 16, 16)
    assert config.max_steps == round(40 * 1_281_167 / 512)
    assert config.adversarial.adaptive_maximum * 3 * 256 * 256 == pytest.approx(1e4, rel=1e-4)


def test_a_step_equals_the_formulas_written_out(configured):
    """Masked, matched by the batch, decoded; no dropout here, whose draws are PyTorch's own."""
    changes = {"adversarial__discriminator_start_step": 0, "adversarial__start_step": 0}
    config = configured(**changes, autoencoder__svg__residual_dropout=0.0)
    with open_run(config, "decoder") as run:
        kind = KINDS["svg"].open(config, run)
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

    draws = [torch.rand((), generator=generator_for(0, "residual mask", position)) for position in range(8)]
    mask = torch.stack(draws) < 0.4
    assert 0 < mask.sum() < 8
    features = twin.encoder(images).tokens.transpose(1, 2)
    residual = torch.where(mask.view(-1, 1, 1), twin.mask_token, twin.residual_encoder(images))
    moments = [
        moment.mean().detach()
        for tokens in (features, residual)
        for moment in (tokens.mean((0, 2)), tokens.std((0, 2)))
    ]
    matched = (residual - moments[2]) / (moments[3] + 1e-6) * moments[1] + moments[0]
    latents = torch.cat([features, matched], dim=1).unflatten(2, (4, 4))
    output = twin.decoder(latents) / 2 + 0.5
    reconstruction = 2.0 * (output - images).abs().mean() + perceptual(output, images).mean()
    adversarial = -judge(output).mean()
    last = twin.decoder.conv_out.weight
    both = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    weight = adaptive_weight(*both, epsilon=1e-4)
    (reconstruction + 0.5 * weight * adversarial).backward()
    assert row["adaptive_weight"] == pytest.approx(weight.item(), rel=1e-4)
    for ours, parameter in zip(gradients, twin.parameters(), strict=True):
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5 * scale + 1e-7, rtol=1e-3)
    assert twin.mask_token.grad.abs().max() > 0
    running = kind.autoencoder.distribution_matching
    torch.testing.assert_close(running.running(), torch.stack(moments))
    assert running.updates == 1


def test_accumulation_equals_the_large_batch(configured, tmp_path):
    """With masks, dropout and the whole loss; the running scalars too."""
    changes = {"adversarial__discriminator_start_step": 0, "adversarial__start_step": 0, "max_steps": 1}
    train(configured(output_dir=tmp_path / "whole", **changes))
    train(configured(output_dir=tmp_path / "split", micro_batch_size=2, **changes))
    (one,), (four,) = (rows(configured(output_dir=tmp_path / name, **changes)) for name in ("whole", "split"))
    assert one.keys() == four.keys() and "adaptive_weight" in one
    for name in one:
        assert four[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name
    whole, split = (
        load_file(tmp_path / name / "checkpoints" / "step-00000001" / "autoencoder.safetensors")
        for name in ("whole", "split")
    )
    assert whole["distribution_matching.updates"] == split["distribution_matching.updates"] == 1
    torch.testing.assert_close(whole["distribution_matching.scalars"], split["distribution_matching.scalars"])


def test_sizes_train_in_turns(configured, tmp_path):
    gates = {"adversarial__discriminator_start_step": 0, "adversarial__start_step": 1}
    train_in_sizes(train, configured, tmp_path, **gates)


@pytest.mark.slow
def test_two_processes_equal_one(configured, tmp_path):
    """Matching scalars, masks and dropout too; 1e-5 while the discriminator has not seen rounding."""
    changes = {"adversarial__weight": 0, "max_steps": 3, "autoencoder__include_encoder": "true"}
    train(configured(output_dir=tmp_path / "whole", **changes))
    save_config(configured(output_dir=tmp_path / "split", **changes), tmp_path / "split.yaml")
    run_two_processes("repagen.training.decoder", tmp_path / "split.yaml")
    for one, two in zip(*(rows(configured(output_dir=tmp_path / name)) for name in ("whole", "split")), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)
    whole, split = (SVGAutoencoder.from_pretrained(tmp_path / name / "autoencoder") for name in ("whole", "split"))
    scalars = [autoencoder.distribution_matching.scalars for autoencoder in (whole, split)]
    torch.testing.assert_close(*scalars, atol=1e-6, rtol=1e-5)


def test_dropout_is_a_function_of_the_key(configured):
    config = configured()
    with open_run(config, "decoder") as run:
        kind = KINDS["svg"].open(config, run)
        dataset = open_dataset(config.data)
        _, micro_batches = next(run.steps(dataset, 0))
        (batch,) = kind.prepare(list(micro_batches))
        first, _ = kind.reconstruct(batch["inputs"])
        torch.manual_seed(5)
        assert torch.equal(first, kind.reconstruct(batch["inputs"])[0])
        part = {name: value if name == "scalars" else value[2:4] for name, value in batch["inputs"].items()}
        torch.testing.assert_close(first[2:4], kind.reconstruct(part)[0])
        other = {**batch["inputs"], "positions": batch["inputs"]["positions"] + 1}
        assert not torch.allclose(first, kind.reconstruct(other)[0])
        assert not any(module.training for module in kind.autoencoder.modules())


def test_a_continued_run_equals_an_uninterrupted_one(configured, tmp_path):
    for name, steps in (("through", (5,)), ("halved", (3, 5))):
        for count in steps:
            train(configured(output_dir=tmp_path / name, max_steps=count))
    assert rows(configured(output_dir=tmp_path / "through")) == rows(configured(output_dir=tmp_path / "halved"))
    for place in ("autoencoder", "checkpoints/step-00000005"):
        one, two = (folder_bytes(tmp_path / name / place) for name in ("through", "halved"))
        tensors = [name for name in one if name.endswith("safetensors")]
        assert tensors and all(one[name] == two[name] for name in tensors)


@pytest.mark.parametrize("matching", ["running", "batch", "none"])
def test_released_latents_are_standardised_per_channel(configured, matching):
    folder = train(
        configured(
            statistics="true",
            max_steps=1,
            data__subset="validation",
            adversarial__weight=0,
            autoencoder__svg__matching=matching,
            autoencoder__include_encoder="true",
            sample__every_steps=1 if matching == "running" else 0,
        )
    )
    autoencoder = SVGAutoencoder.from_pretrained(folder)
    dataset = open_dataset(configured(data__subset="validation").data)
    latents = autoencoder.encode(torch.stack([dataset[i]["image"] for i in range(len(dataset))])).latent
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(52), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(52), atol=1e-2, rtol=0)


def test_released_matching_is_that_of_the_released_weights_without_statistics_too(configured):
    folder = train(
        configured(data__subset="validation", optimizer__learning_rate=0.01, autoencoder__include_encoder="true")
    )
    autoencoder = SVGAutoencoder.from_pretrained(folder)
    released = autoencoder.distribution_matching.scalars.clone()
    dataset = open_dataset(configured(data__subset="validation").data)
    autoencoder.calibrate_matching([torch.stack([dataset[i]["image"] for i in range(len(dataset))])])
    torch.testing.assert_close(released, autoencoder.distribution_matching.scalars, rtol=1e-4, atol=1e-5)
    assert torch.equal(autoencoder.latents_std, torch.ones_like(autoencoder.latents_std))


@pytest.mark.parametrize("change", [{"gradient_checkpointing": "true"}, {"precision": "bf16"}])
def test_memory_and_precision_settings_give_the_same_losses(configured, tmp_path, change):
    plain, changed = configured(output_dir=tmp_path / "plain"), configured(output_dir=tmp_path / "changed", **change)
    train(plain)
    train(changed)
    for one, two in zip(rows(plain), rows(changed), strict=True):
        assert two["l1"] == pytest.approx(one["l1"], rel=1e-5 if "precision" not in change else 0.05)


def test_without_a_residual_only_the_decoder_learns(configured):
    config = configured(autoencoder__svg__use_residual="false", max_steps=1, adversarial__weight=0)
    train(config)
    assert rows(config)[0]["l1"] > 0


def test_mistakes_are_named(configured, tmp_path):
    with pytest.raises(UserError, match=r"autoencoder\.svg\.dropout_samples: 2 samples.*has 1"):
        train(configured(micro_batch_size=1))
    with pytest.raises(UserError, match=r"^autoencoder\.svg\.residual_channels: 0 must"):
        train(configured(autoencoder__svg__residual_channels=0))
    with pytest.raises(UserError, match=r"^autoencoder\.encoder .*nope"):
        train(configured(autoencoder__encoder=tmp_path / "nope"))
    with pytest.raises(UserError, match=r"autoencoder\.noise_tau: has no effect with kind=svg"):
        configured(autoencoder__noise_tau=0.1)
    with pytest.raises(UserError, match=r"autoencoder\.encoder.*not both"):
        configured(autoencoder__pretrained="somewhere")

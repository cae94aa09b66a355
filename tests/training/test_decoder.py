"""Decoder training: the whole loss with its gates, one adaptive weight a step, splits, restarts, releases, presets."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from decoder_parts import SIZES, rows, run_two_processes, settings, train_in_sizes, words, write_parts
from folders import folder_bytes

from repagen import RepresentationAutoencoder, UserError
from repagen.config import load_config, preset_names, read_preset, save_config
from repagen.data import open_dataset
from repagen.randomness import generator_for
from repagen.training.decoder import KINDS, build_loss_networks, train
from repagen.training.decoder_config import DecoderConfig
from repagen.training.decoder_step import DecoderStep, Gates
from repagen.training.discriminator import adaptive_weight, augment, hinge_loss, quantised
from repagen.training.run import open_run

PAPER = "rae_decoder_vitxl_dinov2b"


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def configured(parts, tmp_path):
    """The paper's preset with tiny components and all gates within a few steps; keywords with __ for dots override."""

    def build(**changes) -> DecoderConfig:
        values = {
            **settings(parts),
            "output_dir": tmp_path / "run",
            "max_steps": 6,
            "global_batch_size": 8,
            "checkpoint.every_steps": 100,
            "sample.every_steps": 0,
            "statistics": "false",
            "adversarial.discriminator_start_step": 2,
            "adversarial.start_step": 4,
            "optimizer.learning_rate": 0.001,
            "optimizer.schedule": "{kind: constant}",
            "adversarial.optimizer.schedule": "{kind: constant}",
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        return load_config(DecoderConfig, PAPER, words(values))

    return build


# --- gates ---------------------------------------------------------------------------------------------------------


def test_epochs_become_steps_of_the_dataset(configured):
    config = configured(
        adversarial__discriminator_start_step="null", adversarial__start_step="null", global_batch_size=512
    )
    gates = Gates.from_config(config, dataset_length=1_281_167)
    assert gates == Gates(lpips=0, discriminator=15014, adversarial=20019)  # 6 and 8 of 16 epochs of 2502.3 steps
    assert Gates.from_config(configured(), 1_281_167) == Gates(0, 2, 4)
    off = configured(lpips__weight=0, adversarial__weight=0)
    assert Gates.from_config(off, 1_281_167) == Gates(None, None, None)


def test_each_part_says_when_it_begins_or_that_it_is_off(configured):
    lines = list(Gates.from_config(configured(lpips__weight=0, adversarial__start_step=9), 100).notices(max_steps=6))
    assert "LPIPS" in lines[0] and "off" in lines[0]
    assert "step 2 of 6" in lines[1]
    assert "after the run's end" in lines[2]


def test_rows_hold_the_parts_whose_gates_are_open(configured):
    config = configured(lpips__start_step=1)
    train(config)
    found = rows(config)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [("lpips" in row) for row in found] == [False, True, True, True, True, True]
    assert [("discriminator" in row) for row in found] == [False, False, True, True, True, True]
    assert [("adaptive_weight" in row) for row in found] == [False, False, False, False, True, True]
    for row in found:
        expected = row["l1"] + row.get("lpips", 0.0)
        expected += 0.75 * row.get("adaptive_weight", 0.0) * row.get("adversarial", 0.0)
        assert row["loss"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert math.isfinite(row["psnr"])


# --- one step against its formula ----------------------------------------------------------------------------------


def test_a_step_equals_the_formulas_written_out(configured):
    """lambda, the decoder's gradient and the discriminator's loss, computed plainly from L_G as one graph."""
    config = configured(adversarial__discriminator_start_step=0, adversarial__start_step=0)
    with open_run(config, "decoder") as run:
        dataset = open_dataset(config.data)
        kind = KINDS[config.autoencoder.kind].open(config, run)
        autoencoder = kind.autoencoder
        perceptual, discriminator = build_loss_networks(config.lpips, config.adversarial)
        step = DecoderStep(run, config, kind, dataset, perceptual, discriminator)
        _, micro_batches = next(run.steps(dataset, 0))
        (batch,) = micro_batches
        twin, judge = deepcopy(autoencoder), deepcopy(discriminator)
        gradients = []
        step.optimizer.register_step_pre_hook(
            lambda *_: gradients.extend(p.grad.clone() for p in autoencoder.decoder.parameters() if p.requires_grad)
        )
        row = step(0, iter([batch]))

        generators = [generator_for(0, "latent noise", position) for position in range(8)]
        level = torch.stack([torch.rand((), generator=g) for g in generators])
        noise = torch.stack([torch.randn(48, 4, 4, generator=g) for g in generators])
        latents = twin.training_latents(batch["image"], noise, level)
        output = twin.decode(latents).sample
        reconstruction = (output - batch["image"]).abs().mean() + perceptual(output, batch["image"]).mean()
        views = augment(output, [generator_for(0, "augmentation decoder", i) for i in range(8)])
        adversarial = -judge(views).mean()
        projection = twin.decoder.decoder_pred.weight
        of_both = [
            torch.autograd.grad(loss, projection, retain_graph=True)[0] for loss in (reconstruction, adversarial)
        ]
        weight = adaptive_weight(*of_both)
        (reconstruction + 0.75 * weight * adversarial).backward()
        assert row["adaptive_weight"] == pytest.approx(weight.item(), rel=1e-4)
        assert 0 < row["adaptive_weight"] < 1e4
        expected = [p.grad for p in twin.decoder.parameters() if p.requires_grad]
        for ours, plain in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-5 * plain.abs().max().item() + 1e-7, rtol=1e-3)

        # The discriminator: updated decoder, no noise, 8 bit.
        judge.begin_update()
        with torch.no_grad():
            fakes = quantised(autoencoder.decode(autoencoder.raw_latents(batch["image"])).sample)
            real = judge(augment(batch["image"], [generator_for(0, "augmentation real", i) for i in range(8)]))
            fake = judge(augment(fakes, [generator_for(0, "augmentation fake", i) for i in range(8)]))
        assert row["discriminator"] == pytest.approx(hinge_loss(real, fake).item(), rel=1e-5)


def test_frozen_parts_stay_and_the_rest_learns(configured):
    config = configured()
    with open_run(config, "decoder") as run:
        dataset = open_dataset(config.data)
        kind = KINDS[config.autoencoder.kind].open(config, run)
        autoencoder = kind.autoencoder
        perceptual, discriminator = build_loss_networks(config.lpips, config.adversarial)
        step = DecoderStep(run, config, kind, dataset, perceptual, discriminator)
        frozen = [autoencoder.encoder, discriminator.backbone, perceptual]
        before = [deepcopy(module.state_dict()) for module in (*frozen, autoencoder.decoder, discriminator.heads)]
        for number, micro_batches in run.steps(dataset, 0):
            if micro_batches is not None:
                step(number, micro_batches)
    after = [module.state_dict() for module in (*frozen, autoencoder.decoder, discriminator.heads)]
    moved = [{k for k in old if not torch.equal(old[k], new[k])} for old, new in zip(before, after, strict=True)]
    assert moved[:3] == [set(), set(), set()]
    assert moved[3] == set(before[3]) - {"decoder_pos_embed"}
    # _u of a single output stays 1.
    assert {k for k in before[4] if k.endswith(("weight", "original", "_v"))} <= moved[4]


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gan", [False, True])
def test_accumulation_equals_the_large_batch(configured, tmp_path, gan):
    """Every column to 1e-5; with the whole loss over the first step.

    Later on Adam turns the rounding of gradients near zero into whole steps, which the discriminator then sees.
    """
    changes = {"adversarial__weight": 0}
    if gan:
        changes = {"adversarial__discriminator_start_step": 0, "adversarial__start_step": 0, "max_steps": 1}
    whole = configured(output_dir=tmp_path / "whole", **changes)
    split = configured(output_dir=tmp_path / "split", micro_batch_size=2, **changes)
    train(whole)
    train(split)
    for one, four in zip(rows(whole), rows(split), strict=True):
        assert one.keys() == four.keys() and ("adaptive_weight" in one) == gan
        for name in one:
            assert four[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)


@pytest.mark.slow
def test_two_processes_equal_one(configured, tmp_path):
    whole = configured(output_dir=tmp_path / "whole", adversarial__weight=0)
    train(whole)
    split = configured(output_dir=tmp_path / "split", adversarial__weight=0)
    save_config(split, tmp_path / "split.yaml")
    run_two_processes("repagen.training.decoder", tmp_path / "split.yaml")
    for one, two in zip(rows(whole), rows(split), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (one["step"], name)


# --- restarts ------------------------------------------------------------------------------------------------------


def test_a_continued_run_equals_an_uninterrupted_one(configured, tmp_path):
    through = configured(output_dir=tmp_path / "through", max_steps=7)
    halved = configured(output_dir=tmp_path / "halved", max_steps=5)
    train(through)
    train(halved)
    train(configured(output_dir=tmp_path / "halved", max_steps=7))
    assert rows(through) == rows(halved)
    released = [folder_bytes(tmp_path / name / "autoencoder") for name in ("through", "halved")]
    assert released[0] == released[1]
    state = [folder_bytes(tmp_path / name / "checkpoints" / "step-00000007") for name in ("through", "halved")]
    for name in ("decoder", "ema", "discriminator", "discriminator_optimizer", "optimizer"):
        assert state[0][f"{name}.safetensors"] == state[1][f"{name}.safetensors"], name


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(configured, tmp_path):
    """The whole loss, killed at random moments, then the same command again: same rows, same bytes."""
    changes = {"max_steps": 40, "checkpoint__every_steps": 5, "adversarial__discriminator_start_step": 6}
    changes["adversarial__start_step"] = 12
    train(configured(output_dir=tmp_path / "through", **changes))
    config = configured(output_dir=tmp_path / "killed", **changes)
    save_config(config, tmp_path / "killed.yaml")
    command = [sys.executable, "-m", "repagen.training.decoder", "--config", str(tmp_path / "killed.yaml")]
    moments = torch.Generator().manual_seed(1)
    log = tmp_path / "killed" / "metrics.jsonl"
    kills = 0
    for _ in range(20):
        rows_to_wait = int(torch.randint(3, 16, (), generator=moments))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            grown = 0
            size = log.stat().st_size if log.exists() else 0
            while process.poll() is None and grown < rows_to_wait:
                time.sleep(0.01)
                now = log.stat().st_size if log.exists() else 0
                grown += now > size
                size = now
            time.sleep(0.3 * float(torch.rand((), generator=moments)))
            killed = process.poll() is None
            if killed:
                process.send_signal(signal.SIGKILL)
            error = process.communicate()[1].decode()
        kills += killed
        if not killed:
            assert process.returncode == 0, error[-2000:]
            break
    else:
        pytest.fail("never finished")
    assert kills >= 2
    assert rows(config) == rows(configured(output_dir=tmp_path / "through", **changes))
    assert folder_bytes(tmp_path / "killed" / "autoencoder") == folder_bytes(tmp_path / "through" / "autoencoder")


def test_changed_loss_weights_are_refused_when_a_run_continues(configured, parts, tmp_path):
    train(configured(max_steps=1))
    with pytest.raises(UserError, match=r"lpips\.weight.*1\.0.*0\.5"):
        train(configured(max_steps=2, lpips__weight=0.5))
    heads = torch.load(parts / "tiny_heads.pth", weights_only=True)
    torch.save({key: value * 2 for key, value in heads.items()}, tmp_path / "tiny_heads.pth")
    with pytest.raises(UserError, match="lpips"):
        train(configured(max_steps=2, lpips__heads=tmp_path / "tiny_heads.pth"))


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_step(configured, parts, tmp_path):
    heads = torch.load(parts / "tiny_heads.pth", weights_only=True)
    heads["lin0.model.1.weight"][:] = 3e38  # finite, as files have to be; the distance is not
    torch.save(heads, tmp_path / "huge.pth")
    config = configured(lpips__heads=tmp_path / "huge.pth", lpips__start_step=3, checkpoint__every_steps=2)
    with pytest.raises(UserError, match=r"step 3: loss=(inf|nan).*not finite.*samples: digit"):
        train(config)
    assert [row["step"] for row in rows(config)] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_absent_weights_name_the_switch(configured, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"lpips\.trunk.*lpips\.weight=0"):
        train(configured(lpips__trunk="null"))
    with pytest.raises(UserError, match=r"adversarial\.backbone.*adversarial\.weight=0"):
        train(configured(adversarial__backbone=tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lpips__weight": -1}, r"command line:lpips\.weight: must be at least 0"),
        ({"autoencoder__pretrained": "somewhere"}, r"autoencoder\.encoder.*not both"),
        ({"autoencoder__encoder": "null"}, r"autoencoder\.encoder"),
        ({"autoencoder__decoder": "{decoder_hidden_size: 3}"}, r"autoencoder\.decoder: .*decoder_num_attention_heads"),
        ({"autoencoder__decoder": "vit-h"}, r"autoencoder\.decoder"),
        ({"data__kind": "latents", "data__path": "x"}, r"data\.kind"),
        ({"adversarial__start_epoch": -1}, r"adversarial\.start_epoch"),
    ],
)
def test_wrong_settings_are_named(configured, changes, message):
    with pytest.raises(UserError, match=message):
        configured(**changes)


# --- images of several sizes ---------------------------------------------------------------------------------------


def test_sizes_train_in_turns_and_the_statistics_are_those_of_squares(configured, tmp_path):
    told = {"statistics": "true", "autoencoder__include_encoder": "true"}
    released = RepresentationAutoencoder.from_pretrained(train_in_sizes(train, configured, tmp_path, **told))
    squares = configured(output_dir=tmp_path / "squares", max_steps=1, **told, **{**SIZES, "data__buckets": "[]"})
    of_squares = RepresentationAutoencoder.from_pretrained(train(squares))
    assert torch.equal(released.latents_mean, of_squares.latents_mean)
    assert torch.equal(released.latents_std, of_squares.latents_std)


def test_a_step_on_wide_images_equals_the_mean_absolute_error(configured):
    config = configured(adversarial__weight=0, lpips__weight=0, **{**SIZES, "data__buckets": "[[24, 40]]"})
    with open_run(config, "decoder") as run:
        dataset = open_dataset(config.data)
        kind = KINDS["representation"].open(config, run)
        step = DecoderStep(run, config, kind, dataset, None, None)
        latents = kind.autoencoder.raw_latents(torch.stack([dataset[k]["image"] for k in range(2)]), (3, 5))
        _, micro_batches = next(iter(run.steps(dataset, 0)))
        batch = kind.prepare([next(micro_batches)])[0]
        expected = kind.reconstruct(batch["inputs"])[0] - batch["image"]
        row = step(0, iter([batch]))
    assert latents.shape == (2, 48, 3, 5) and batch["latents"].shape == (8, 48, 3, 5)
    assert row["l1"] == pytest.approx(expected.abs().mean().item(), rel=1e-5)


def test_sizes_that_the_autoencoder_does_not_take_are_refused_at_once(configured, tmp_path):
    config = configured(**{**SIZES, "data__buckets": "[[32, 32], [28, 36]]", "data__bucket_step": 4})
    with pytest.raises(UserError, match=r"data\.buckets: 28x36 px; allowed: multiples of the autoencoder's 8 px"):
        train(config)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# --- releases ------------------------------------------------------------------------------------------------------


def test_released_autoencoder_reloads_with_ema_weights_and_statistics(configured, tmp_path):
    config = configured(statistics="true", sample__every_steps=3, autoencoder__include_encoder="true")
    folder = train(config)
    assert folder == tmp_path / "run" / "autoencoder"
    autoencoder = RepresentationAutoencoder.from_pretrained(folder)
    from repagen.training.checkpoint import CheckpointFolder

    shadow = CheckpointFolder(tmp_path / "run" / "checkpoints").newest().part("ema")["shadow"]
    assert all(torch.equal(value, shadow[name]) for name, value in autoencoder.decoder.state_dict().items())
    dataset = open_dataset(config.data)
    latents = autoencoder.encode(torch.stack([dataset[i]["image"] for i in range(len(dataset))])).latent
    assert latents.mean(0).abs().max() < 1e-3
    std = latents.std(0, correction=0)
    assert ((std - 1).abs() < 1e-2).float().mean() > 0.99  # elements of almost no variance have the epsilon
    assert autoencoder.decode(latents[:2]).sample.shape == (2, 3, 32, 32)
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000003.png",
        "step-00000006.png",
    ]


def test_training_goes_on_from_a_released_autoencoder(configured, tmp_path):
    first = train(configured(output_dir=tmp_path / "first", statistics="true", autoencoder__include_encoder="true"))
    second = train(
        configured(
            output_dir=tmp_path / "second",
            max_steps=1,
            autoencoder__encoder="null",
            autoencoder__pretrained=first,
            autoencoder__noise_tau=0.0,
            adversarial__weight=0,
        )
    )
    old, new = (RepresentationAutoencoder.from_pretrained(folder) for folder in (first, second))
    assert torch.equal(old.latents_std, new.latents_std) and old.latents_std.ne(1).any()
    assert new.config.noise_tau == 0.0
    row = rows(configured(output_dir=tmp_path / "second", max_steps=1))[0]
    last = rows(configured(output_dir=tmp_path / "first"))[-1]
    assert row["l1"] < 1.5 * last["l1"]  # not a new decoder, and no statistics mixed into its input
    with pytest.raises(UserError, match=r"data\.image_size.*32"):
        configured_size = configured(
            output_dir=tmp_path / "third",
            autoencoder__encoder="null",
            autoencoder__pretrained=first,
            data__image_size=64,
        )
        train(configured_size)


# --- presets -------------------------------------------------------------------------------------------------------


def test_paper_preset_has_the_published_decoder():
    config = load_config(DecoderConfig, PAPER, ["data.path=imagenet"])
    from repagen.models.autoencoder_representation import DECODER_SIZES

    with torch.device("meta"):
        autoencoder = RepresentationAutoencoder(
            latent_channels=768, latent_size=16, decoder_patch_size=16, **DECODER_SIZES[config.autoencoder.decoder]
        )
    assert sum(p.numel() for p in autoencoder.decoder.parameters()) == 415_352_704
    assert autoencoder.image_size == config.data.image_size == 256
    epoch = 1_281_167 / config.global_batch_size
    assert config.max_steps == round(16 * epoch) + 1 or config.max_steps == round(16 * epoch)
    for settings_of in (config.optimizer, config.adversarial.optimizer):
        assert settings_of.schedule.warmup_steps == round(epoch)
        assert settings_of.learning_rate * settings_of.schedule.final_share == pytest.approx(2e-5)
        assert settings_of.max_grad_norm is None and settings_of.weight_decay == 0


DECODERS = [name for name in preset_names() if read_preset(name)["recipe"]["program"] == "decoder"]
RAEV2 = {
    "raev2_decoder_dinov3l_k1": ("last", "last"),
    "raev2_decoder_dinov3l_k7": ([11, 13, 15, 17, 19, 21, 23], "mean_plus_spatial_mean"),
    "raev2_decoder_dinov3l_k23": (list(range(1, 24)), "mean_plus_spatial_mean"),
}


@pytest.mark.parametrize("name", DECODERS)
def test_presets_describe_themselves(name):
    recipe = load_config(DecoderConfig, name, ["data.path=unused"]).recipe
    assert all((recipe.title, recipe.paper, recipe.cost, recipe.expected))


@pytest.mark.parametrize("name", RAEV2)
def test_raev2_differs_from_rae_in_layers_pixels_and_betas(name):
    config, rae = (load_config(DecoderConfig, preset, ["data.path=unused"]) for preset in (name, PAPER))
    assert (config.autoencoder.layers, config.autoencoder.combination) == RAEV2[name]
    assert not config.autoencoder.normalised_pixels and rae.autoencoder.normalised_pixels
    assert (config.optimizer.beta1, config.optimizer.beta2) == (0.9, 0.95)
    for key in ("max_steps", "global_batch_size", "lpips", "ema", "data"):
        assert getattr(config, key) == getattr(rae, key)


@pytest.mark.parametrize("name", [PAPER, "raev2_decoder_dinov3l_k7", "digits_decoder", "digits_decoder_multilayer"])
def test_one_step_of_each_preset_with_reduced_widths(name, parts, tmp_path):
    values = settings(parts) | {"output_dir": tmp_path / "run", "max_steps": 1, "global_batch_size": 4}
    values |= {"statistics": "false"}
    published = not name.startswith("digits")
    if published:
        values |= {"adversarial.discriminator_start_epoch": 0, "adversarial.start_epoch": 0}
    if name in RAEV2 or name.endswith("multilayer"):
        values |= {"autoencoder.layers": "[0, 1]"}
    config = load_config(DecoderConfig, name, words(values))
    autoencoder = RepresentationAutoencoder.from_pretrained(train(config))
    (row,) = rows(config)
    assert ("adaptive_weight" in row) == published
    assert (list(autoencoder.config.image_std) == [1.0] * 3) != config.autoencoder.normalised_pixels


@pytest.mark.slow
def test_digits_preset_lowers_l1_by_a_third_in_200_steps(tmp_path):
    changes = {"output_dir": tmp_path / "run", "max_steps": 200, "progress_bar": "false"}
    config = load_config(DecoderConfig, "digits_decoder", words(changes))
    train(config)
    losses = [row["l1"] for row in rows(config)]
    assert sum(losses[-20:]) / 20 < 0.7 * sum(losses[:5]) / 5
    assert json.loads((tmp_path / "run" / "autoencoder" / "config.json").read_text())["encoder_stored"]

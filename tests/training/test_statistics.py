"""Latent statistics: equal to numpy over all latents at once, for every batch size and number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import repagen
from repagen.cli import main
from repagen.data import DataConfig, ImageDataset, open_dataset
from repagen.encoders import VisionEncoder
from repagen.errors import UserError
from repagen.models.latents import images_to_latents
from repagen.training.latent_cache import cache_latents
from repagen.training.latent_statistics import (
    ElementMoments,
    LatentStatistics,
    compute_latent_statistics,
    latent_moments,
    set_latent_statistics,
)

ENCODER = {
    "family": "dinov2_with_registers",
    "config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2,
        "image_size": 16, "patch_size": 8, "num_register_tokens": 1,
    },
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


@pytest.fixture
def autoencoder() -> repagen.RepresentationAutoencoder:
    encoder = VisionEncoder.from_config(ENCODER)
    return repagen.RepresentationAutoencoder.from_encoder(encoder, decoder=DECODER, image_size=16).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """70 noisy pictures, more than the 64 stretches that the dataset is cut into."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 16, 16, 3), dtype=np.uint8)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return folder


def opened(photos: Path, **options: object) -> ImageDataset:
    dataset = open_dataset(DataConfig(path=str(photos), image_size=16, **options))  # type: ignore[arg-type]
    assert isinstance(dataset, ImageDataset)
    return dataset


def test_moments_merge_exactly_in_any_parts() -> None:
    values = torch.randn(1000, 5, dtype=torch.float64) * torch.tensor([1, 1e-3, 1e3, 1, 1]) + 1e4
    whole = ElementMoments.of(values)
    for size in (1, 7, 128, 999):
        parts = [ElementMoments.of(part) for part in values.split(size)]
        total = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        assert total.count == 1000
        torch.testing.assert_close(total.mean, whole.mean, rtol=1e-14, atol=0)
        # Deviations of 1e-3 around 1e4: naive sums of squares would be wrong in the first digit.
        torch.testing.assert_close(total.squares, whole.squares, rtol=1e-8, atol=0)
    expected = values.numpy().var(axis=0) * 1000
    np.testing.assert_allclose(whole.squares.numpy(), expected, rtol=1e-8)


@pytest.mark.parametrize("flips", [False, True])
def test_statistics_equal_numpy_over_all_latents(autoencoder: object, photos: Path, flips: bool) -> None:
    dataset = opened(photos)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    views = torch.cat([images, images.flip(-1)]) if flips else images
    latents = autoencoder.raw_latents(views).double().numpy()  # type: ignore[attr-defined]
    result = compute_latent_statistics(autoencoder, dataset, batch_size=32, flips=flips)  # type: ignore[arg-type]
    np.testing.assert_allclose(result.mean.numpy(), latents.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.variance.numpy(), latents.var(0), rtol=1e-5)
    assert result.images == 70 and result.mean.shape == (16, 2, 2)


def looked_up(images: torch.Tensor) -> torch.Tensor:
    """Latents (B, 2, 1, 1) free of an encoder's rounding."""
    pixels = images.double()
    return torch.stack([pixels.mean((1, 2, 3)), pixels.amax((1, 2, 3)) - 0.9], 1)[..., None, None]


SVG_SIZES = {
    "encoder_channels": 16, "latent_size": 2, "residual_channels": 2, "residual_hidden_size": 16,
    "residual_num_layers": 1, "residual_num_heads": 2, "residual_intermediate_size": 16, "norm_num_groups": 4,
    "decoder_block_out_channels": (4, 4, 4, 8), "decoder_layers_per_block": 1,
    "decoder_up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def per_channel(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (C, 1, 1) over images and places of latents (B, C, h, w)."""
    return latents.mean((0, 2, 3))[:, None, None], latents.var((0, 2, 3))[:, None, None]


def test_other_kinds_are_standardised_per_channel(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = opened(photos)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    svg = repagen.SVGAutoencoder(encoder=ENCODER, **SVG_SIZES).eval()  # type: ignore[arg-type]
    svg.calibrate_matching([images])
    for kind in (svg, repagen.PixelAutoencoder(image_size=16)):
        result = compute_latent_statistics(kind, dataset)
        mean, variance = per_channel(kind.raw_latents(images).double().numpy())
        np.testing.assert_allclose(result.mean.numpy(), mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(result.variance.numpy(), variance, rtol=1e-4)
        set_latent_statistics(kind, result)
        latents = images_to_latents(kind, images).transpose(0, 1).flatten(1)
        torch.testing.assert_close(latents.mean(1), torch.zeros(len(latents)), atol=1e-4, rtol=0)
        torch.testing.assert_close(latents.std(1), torch.ones(len(latents)), atol=5e-3, rtol=0)


def test_a_kl_autoencoders_statistics_are_of_draws_and_go_into_its_config(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset = opened(photos)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    model: Any = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2).eval()
    result = compute_latent_statistics(model, dataset)
    draws = [model.encode(2 * images - 1).latent_dist.sample() for _ in range(20)]
    mean, variance = per_channel(torch.cat(draws).detach().double().numpy())
    np.testing.assert_allclose(result.mean.numpy(), mean, atol=5e-3)
    np.testing.assert_allclose(result.variance.numpy(), variance, rtol=1e-2)
    set_latent_statistics(model, result)
    model.save_pretrained(tmp_path / "kl")
    latents = images_to_latents(AutoencoderKL.from_pretrained(tmp_path / "kl"), images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.std(1), torch.ones(2), atol=2e-2, rtol=0)
    wrong: Any = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=3)
    with pytest.raises(UserError, match="of 2 channels, but this autoencoder's latents have 3"):
        set_latent_statistics(wrong, result)


def test_command_takes_other_kinds(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = repagen.PixelAutoencoder(image_size=16)
    run_command(command(pixels, photos, tmp_path, "out"), monkeypatch)
    copy = repagen.PixelAutoencoder.from_pretrained(tmp_path / "out")
    expected = compute_latent_statistics(pixels, opened(photos))
    torch.testing.assert_close(copy.latents_mean, expected.mean.float())


@pytest.fixture
def official_svg(tmp_path: Path) -> repagen.SVGAutoencoder:
    """An SVG autoencoder that matches by the batch, as converted ones do, saved in `ae`."""
    torch.manual_seed(0)
    encoder = VisionEncoder.from_config(ENCODER)
    sizes = {name: value for name, value in SVG_SIZES.items() if name not in ("encoder_channels", "latent_size")}
    svg: Any = repagen.SVGAutoencoder.from_encoder(encoder, 16, matching="batch", **sizes).eval()
    svg.save_pretrained(tmp_path / "ae", include_encoder=True)
    return svg


def test_latents_that_depend_on_their_batch_are_refused_and_the_command_has_a_way_out(
    official_svg: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(official_svg, photos, tmp_path, "out")
    cache = ["cache", *words[1:]]
    for refused in (words, cache):
        with pytest.raises(SystemExit, match="2"):
            run_command(refused, monkeypatch)
        error = capsys.readouterr().err
        assert "--autoencoder: matching='batch'" in error and "--matching running" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="depend on the other images"):
        compute_latent_statistics(official_svg, opened(photos))
    with pytest.raises(UserError, match="depend on the other images"):
        cache_latents(official_svg, opened(photos), tmp_path / "cache")

    results = []
    for size in (3, 64):
        run_command([*words, "--matching", "running", f"--batch-size={size}"], monkeypatch)
        results.append(repagen.SVGAutoencoder.from_pretrained(tmp_path / "out").eval())
    assert all(not svg.latents_depend_on_batch and svg.config.matching == "running" for svg in results)
    dataset = opened(photos)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    official_svg.calibrate_matching(images.split(7))
    for svg in results:
        torch.testing.assert_close(
            svg.distribution_matching.scalars, official_svg.distribution_matching.scalars, rtol=1e-5, atol=1e-6
        )
    latents = images_to_latents(results[0], images)
    torch.testing.assert_close(latents, images_to_latents(results[1], images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents[:1], images_to_latents(results[0], images[:1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(18), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(18), atol=5e-3, rtol=0)


def test_matching_needs_a_residual_and_a_folder(
    official_svg: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command(official_svg, photos, tmp_path, "statistics.safetensors")
    with pytest.raises(SystemExit, match="2"):
        run_command([*words, "--matching", "running"], monkeypatch)
    assert "--matching: " in capsys.readouterr().err
    repagen.PixelAutoencoder(image_size=16).save_pretrained(tmp_path / "ae")
    words = command(official_svg, photos, tmp_path, "out")
    with pytest.raises(SystemExit, match="2"):
        run_command([*words, "--matching", "running"], monkeypatch)
    assert "--matching: this autoencoder matches no residual" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nope", "runs/nope"])
def test_a_relative_folder_that_is_not_there_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ["stats", "data.kind=digits", "data.image_size=32", "--autoencoder", name, "--output", "x"]
    with pytest.raises(SystemExit, match="2"):  # a warning would be an error here
        run_command(words, monkeypatch)
    said = "no such folder: nope" if name == "nope" else f"model '{name}': no such folder here, and not in the local"
    assert capsys.readouterr().err.startswith(f"repagen: error: --autoencoder: {said}")


def test_batch_size_does_not_matter_beyond_the_encoders_rounding(autoencoder: object, photos: Path) -> None:
    dataset = opened(photos)
    cpu = torch.device("cpu")
    exact = [latent_moments(looked_up, (2, 1, 1), dataset, device=cpu, batch_size=size) for size in (1, 3, 64)]
    real = [compute_latent_statistics(autoencoder, dataset, batch_size=size) for size in (1, 3, 64)]  # type: ignore[arg-type]
    for other in exact[1:]:
        torch.testing.assert_close(other.mean, exact[0].mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(other.squares, exact[0].squares, rtol=1e-12, atol=0)
    for other in real[1:]:
        torch.testing.assert_close(other.variance, real[0].variance, rtol=1e-5, atol=0)


def test_own_statistics_do_not_matter_and_stay(autoencoder: object, photos: Path) -> None:
    dataset = opened(photos)
    first = compute_latent_statistics(autoencoder, dataset)  # type: ignore[arg-type]
    autoencoder.set_statistics(first.mean, first.variance)  # type: ignore[attr-defined]
    again = compute_latent_statistics(autoencoder, dataset)  # type: ignore[arg-type]
    assert torch.equal(again.mean, first.mean) and torch.equal(again.variance, first.variance)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    standardised = autoencoder.encode(images).latent  # type: ignore[attr-defined]
    assert standardised.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(standardised.var(0, unbiased=False), torch.ones(16, 2, 2), rtol=1e-2, atol=0)


def test_bad_images_are_left_out(autoencoder: object, photos: Path) -> None:
    (photos / "03.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"03\.png"):
        compute_latent_statistics(autoencoder, opened(photos))  # type: ignore[arg-type]
    result = compute_latent_statistics(autoencoder, opened(photos, max_bad_images=1))  # type: ignore[arg-type]
    (photos / "03.png").unlink()
    clean = compute_latent_statistics(autoencoder, opened(photos))  # type: ignore[arg-type]
    assert result.images == clean.images == 69
    torch.testing.assert_close(result.variance, clean.variance, rtol=1e-5, atol=0)


def test_a_latent_that_is_not_finite_names_its_image(photos: Path) -> None:
    dataset = opened(photos)
    level = float(dataset[41]["image"].double().mean())

    def broken(images: torch.Tensor) -> torch.Tensor:
        latents = looked_up(images)
        return torch.where((latents[:, :1] - level).abs() < 1e-12, torch.nan, latents)

    with pytest.raises(UserError, match=r"41\.png: its latent is not finite"):
        latent_moments(broken, (2, 1, 1), dataset, device=torch.device("cpu"))


def test_the_file_holds_all_and_damage_is_refused(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    statistics = compute_latent_statistics(autoencoder, opened(photos))  # type: ignore[arg-type]
    path = tmp_path / "new" / "statistics.safetensors"
    statistics.save(path)
    back = LatentStatistics.load(path)
    assert torch.equal(back.mean, statistics.mean) and torch.equal(back.variance, statistics.variance)
    assert (back.images, back.encoder, back.dataset) == (70, statistics.encoder, opened(photos).fingerprint())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"statistics\.safetensors"):
        LatentStatistics.load(path)
    with pytest.raises(UserError, match="no statistics"):
        LatentStatistics.load(tmp_path / "nowhere.safetensors")


def command(autoencoder: object, photos: Path, tmp_path: Path, output: str, *more: str) -> list[str]:
    if not (tmp_path / "ae").exists():
        autoencoder.save_pretrained(tmp_path / "ae")  # type: ignore[attr-defined]
    data = [f"data.path={photos}", "data.image_size=16", *more]
    return ["stats", *data, "--autoencoder", str(tmp_path / "ae"), "--output", str(tmp_path / output)]


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["repagen", *words])
    main()


def test_command_writes_a_copy_with_statistics(
    autoencoder: object,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_command(command(autoencoder, photos, tmp_path, "out", "data.horizontal_flip=true"), monkeypatch)
    assert "statistics of 70 of 70 images, each mirrored too" in capsys.readouterr().out
    copy = repagen.RepresentationAutoencoder.from_pretrained(tmp_path / "out")
    expected = compute_latent_statistics(autoencoder, opened(photos), flips=True)  # type: ignore[arg-type]
    torch.testing.assert_close(copy.latents_mean, expected.mean.float())
    torch.testing.assert_close(copy.latents_std, (expected.variance + 1e-5).sqrt().float())
    original = repagen.RepresentationAutoencoder.from_pretrained(tmp_path / "ae")
    assert original.latents_mean.abs().max() == 0
    assert torch.equal(copy.decoder.decoder_pred.weight, original.decoder.decoder_pred.weight)


def test_command_never_replaces_a_foreign_folder(
    autoencoder: object,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(command(autoencoder, photos, tmp_path, "photos"), monkeypatch)
    assert "no saved autoencoder" in capsys.readouterr().err
    assert len(list(photos.iterdir())) == 70


@pytest.mark.slow
def test_two_processes_give_the_same_file(autoencoder: object, photos: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, output in (([sys.executable], "one.safetensors"), (torchrun, "two.safetensors")):
        words = command(autoencoder, photos, tmp_path, output, "--batch-size=8")
        subprocess.run(
            [*launcher, "-m", "repagen.cli", *words], check=True, env=environment, capture_output=True, timeout=300
        )
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert LatentStatistics.load(tmp_path / "two.safetensors").images == 70

"""`RepresentationAutoencoder`: numbers, noise, grids, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoder_cases import TINY_DECODER, TINY_ENCODER, tiny_autoencoder, tiny_config

from repagen import RepresentationAutoencoder, VisionEncoder
from repagen.errors import UserError
from repagen.models.autoencoder_representation import DECODER_SIZES, RepresentationDecoder


def images(count: int = 2, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("size", "parameters"), [("vit-b", 86_435_328), ("vit-l", 304_150_272), ("vit-xl", 415_352_704)]
)
def test_published_decoders_have_the_published_number_of_parameters(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = RepresentationAutoencoder(**DECODER_SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert (model.latent_shape, model.image_size) == ((768, 16, 16), 256)


def test_the_statistics_standardise_and_decode_undoes_them() -> None:
    plain, model = tiny_autoencoder(), tiny_autoencoder()
    mean, var = torch.randn(32, 4, 4), torch.rand(32, 4, 4) + 0.1
    plain.set_statistics(None, None)
    model.set_statistics(mean, var)
    raw = plain.encode(images()).latent
    latents = model.encode(images()).latent
    torch.testing.assert_close(latents, (raw - mean) / (var + 1e-5).sqrt())
    torch.testing.assert_close(model.decode(latents).sample, plain.decode(raw).sample, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(images()).sample, plain(images()).sample, atol=1e-5, rtol=0)
    # Tokens come without the affine part of the final norm: zero mean and unit variance over the channels.
    torch.testing.assert_close(raw.var(1, unbiased=False), torch.ones(2, 4, 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("mean", "var", "named"),
    [
        (torch.zeros(32, 4, 5), None, r"mean has shape \(32, 4, 5\)"),
        (None, torch.zeros(16, 4, 4), "another encoder or image size"),
        (None, -torch.ones(32, 4, 4), "negative variances"),
        (torch.full((32, 4, 4), float("nan")), None, "not finite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(mean: Any, var: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        tiny_autoencoder().set_statistics(mean, var)


def test_training_noise_is_scaled_per_sample_and_added_before_standardisation() -> None:
    model = tiny_autoencoder(noise_tau=0.8)
    noise, level = torch.randn(2, 32, 4, 4), torch.tensor([0.0, 0.5])
    clean = model.encode(images()).latent
    noisy = model.training_latents(images(), noise=noise, noise_level=level)
    assert torch.equal(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1] - clean[1], 0.8 * 0.5 * noise[1] / model.latents_std, atol=1e-5, rtol=0)
    again = model(images(), noise=noise, noise_level=level).sample
    assert torch.equal(again, model.decode(noisy).sample)


def test_noise_is_drawn_in_training_mode_only_and_from_the_generator() -> None:
    model = tiny_autoencoder(noise_tau=0.8)
    clean = model.encode(images()).latent
    assert torch.equal(model.encode(images()).latent, clean)
    model.train()
    drawn = [model.encode(images(), generator=torch.Generator().manual_seed(s)).latent for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], clean)
    assert not model.encoder.training


def test_only_the_decoder_trains() -> None:
    model = tiny_autoencoder().train()
    model(images()).sample.mean().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert with_gradient == trainable == {name for name, _ in model.named_parameters()} - {"decoder.decoder_pos_embed"}
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert not any(name.startswith("encoder") for name in model.state_dict())


def test_slicing_changes_nothing() -> None:
    model = tiny_autoencoder()
    whole, latents = model(images(3)).sample, model.encode(images(3)).latent
    model.enable_slicing()
    torch.testing.assert_close(model.encode(images(3)).latent, latents, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(images(3)).sample, whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("side", "patch", "input_side"),
    [(16, 4, 32), (32, 8, 32), (32, 4, 64), (20, 4, 40)],  # same, upsampling decoder, finer grid, an odd grid
)
def test_any_square_grid(side: int, patch: int, input_side: int) -> None:
    encoder = VisionEncoder.from_config({**TINY_ENCODER, "image_size": input_side})
    model = RepresentationAutoencoder.from_encoder(encoder, TINY_DECODER, side, patch).eval()
    grid = side // patch
    assert model.encode(images(1, side)).latent.shape == (1, 32, grid, grid)
    assert model(images(1, side)).sample.shape == (1, 3, side, side)


@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (32, 4, 4)])
def test_other_latents_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"\(B, 32, h, w\)"):
        tiny_autoencoder().decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers"),
        ({"decoder_num_hidden_layers": True}, "decoder_num_hidden_layers"),
        ({"latent_size": 4.0}, "latent_size"),
        ({"decoder_num_attention_heads": 3}, "decoder_hidden_size"),
        ({"noise_tau": -1}, "noise_tau"),
        ({"noise_tau": "0.8"}, "noise_tau"),
        ({"image_std": [1, 1, 0]}, "image_std"),
        ({"image_mean": [1, 1]}, "image_mean"),
        ({"encoder": {**TINY_ENCODER, "layer": 1}}, "layer"),
    ],
)
def test_impossible_configs_name_the_key(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        RepresentationAutoencoder(**tiny_config(**changes))


def test_from_encoder_takes_folders_and_shares_encoders(golden: Path) -> None:
    folder = golden / "rae_dinov2" / "encoder"
    model = RepresentationAutoencoder.from_encoder(folder, TINY_DECODER, image_size=16, decoder_patch_size=4)
    assert (model.encoder.image_size, model.latent_shape, model.config.noise_tau) == (56, (64, 4, 4), 0.8)
    target = VisionEncoder.from_pretrained(folder, image_size=56)
    shared = RepresentationAutoencoder.from_encoder(target, TINY_DECODER, image_size=16)
    assert shared.encoder.backbone is target.backbone
    assert target.norm_affine and not shared.encoder.norm_affine
    for arguments, named in (((folder, "vit-huge", 16, 4), "vit-huge"), ((folder, "vit-b", 18, 4), "18 px")):
        with pytest.raises(UserError, match=named):
            RepresentationAutoencoder.from_encoder(*arguments)
    with pytest.raises(UserError, match="grid 4 times"):
        RepresentationAutoencoder.from_encoder(target, TINY_DECODER, image_size=32, decoder_patch_size=4)


def test_an_encoder_that_only_decodes() -> None:
    model = RepresentationAutoencoder(**tiny_config(encoder=None))
    assert model.decode(torch.zeros(1, 32, 4, 4)).sample.shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="without an encoder"):
        model.encode(images())


def test_decoder_resizes_another_grid_as_officially(golden: Path) -> None:
    # The golden part is in tests/conversion; here: a constant latent is the same on every grid.
    decoder = RepresentationDecoder(8, 4, 2, 16, 1, 2, 16)
    token = torch.randn(1, 1, 8)
    torch.testing.assert_close(decoder(token.expand(1, 36, 8)), decoder(token.expand(1, 16, 8)), atol=1e-6, rtol=0)


def test_half_precision_keeps_norms_positions_and_statistics(tmp_path: Path) -> None:
    model = tiny_autoencoder()
    model.save_pretrained(tmp_path)
    loaded = RepresentationAutoencoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    kept = {
        "latent_statistics.mean",
        "latent_statistics.std",
        "decoder.decoder_pos_embed",
        "decoder.decoder_norm.weight",
    }
    assert all(loaded.state_dict()[name].dtype == torch.float32 for name in kept)
    exact, rounded = model(images()).sample, loaded(images()).sample
    assert loaded.encode(images()).latent.dtype == torch.bfloat16
    assert (rounded - exact).norm() / exact.norm() < 2e-2


def test_config_holds_no_tensors_and_no_paths_of_this_machine(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path / "one")
    RepresentationAutoencoder.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    text = (tmp_path / "two" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert "latents_mean" not in json.loads(text)
    for path in (path for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path

"""SVG's autoencoder: matching, masks, gradients, grids, saving. tests/conversion/test_svg.py holds its numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from autoencoder_cases import TINY_DINOV3, tiny_svg, tiny_svg_config
from diffusers import AutoModel
from safetensors.torch import load_file, save_file

from repagen import SVGAutoencoder, VisionEncoder
from repagen.errors import UserError
from repagen.models.autoencoder_svg import DistributionMatching


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def raw(model: SVGAutoencoder) -> SVGAutoencoder:
    """The same autoencoder without statistics."""
    model.set_statistics(None)
    return model


def test_published_size() -> None:
    """43.1M in the decoder, 11.2M in the residual encoder (SVG section 4.1 of the paper)."""
    with torch.device("meta"):
        model = SVGAutoencoder()
    count = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("decoder", model.decoder), ("residual", model.residual_encoder))
    }
    assert (round(count["decoder"] / 1e6, 1), count["residual"]) == (43.1, 11_192_840)
    assert model.latent_shape == (392, 16, 16) and model.image_size == 256


@torch.no_grad()
def test_the_encoder_is_the_first_part_and_the_rest_is_matched(images: torch.Tensor) -> None:
    model = raw(tiny_svg())
    latents = model.encode(images, matching="batch").latent
    tokens = model.encoder(images).tokens
    assert torch.equal(latents[:, :32], tokens.transpose(1, 2).unflatten(2, (4, 4)))
    residual, features = latents[:, 32:].flatten(2), latents[:, :32].flatten(2)
    encoders, own = DistributionMatching.of_batch(features, residual).split(2)
    torch.testing.assert_close(own, encoders, atol=1e-5, rtol=0)


@torch.no_grad()
def test_running_scalars_make_latents_independent_of_their_neighbours(images: torch.Tensor) -> None:
    model = tiny_svg()
    together, alone = model.encode(images).latent, model.encode(images[:1]).latent
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
    together, alone = (model.encode(batch, matching="batch").latent for batch in (images, images[:1]))
    assert (together[0, 32:] - alone[0, 32:]).abs().max() > 1e-3
    torch.testing.assert_close(together[:1, :32], alone[:, :32], atol=1e-5, rtol=0)


@torch.no_grad()
def test_calibration_is_exact_over_all_images_however_cut(images: torch.Tensor) -> None:
    model = tiny_svg(matching="batch")
    expected = model.encode(images).latent
    for size in (1, 2, 3):
        twin = copy.deepcopy(model)
        twin.calibrate_matching(images.split(size))
        assert twin.config.matching == "running"
        torch.testing.assert_close(twin.encode(images).latent, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_running_without_scalars_is_refused_by_name(images: torch.Tensor) -> None:
    model = SVGAutoencoder(**tiny_svg_config()).eval()
    with pytest.raises(UserError, match=r"matching='running': .* calibrate_matching\(batches\)"):
        model.encode(images)
    assert model.encode(images, matching="batch").latent.shape == (3, 36, 4, 4)
    with pytest.raises(UserError, match="matching: 'layer' is none of running, batch, none"):
        model.encode(images, matching="layer")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no images"):
        model.calibrate_matching([])


def test_training_moves_the_running_scalars_from_the_first_batch_on(images: torch.Tensor) -> None:
    model = SVGAutoencoder(**tiny_svg_config(residual_dropout=0.0, mask_probability=0.0)).train()
    features, residual = model.encoder_features(images), model.residual_encoder(images)
    expected = DistributionMatching.of_batch(features, residual)
    model.training_latents(images)
    torch.testing.assert_close(model.distribution_matching.scalars, expected)
    other = images.flip(0) * 0.5
    second = DistributionMatching.of_batch(model.encoder_features(other), model.residual_encoder(other))
    model.training_latents(other)
    torch.testing.assert_close(model.distribution_matching.scalars, (expected + second) / 2)
    model.eval().training_latents(images)
    torch.testing.assert_close(model.distribution_matching.scalars, (expected + second) / 2)


def test_masks_replace_whole_residuals_before_matching(images: torch.Tensor) -> None:
    model = raw(tiny_svg())
    mask = torch.tensor([False, True, False])
    latents = model.training_latents(images, mask)
    features, residual = model.encoder_features(images), model.residual_encoder(images)
    replaced = residual.clone()
    replaced[1] = model.mask_token[0].expand(-1, 16)
    match = model.distribution_matching
    expected = match(replaced, match.of_batch(features, replaced))
    torch.testing.assert_close(latents[:, 32:].flatten(2), expected)
    assert latents[1, 32:].flatten(1).std(1).max() < 1e-6  # the same at every token


def test_masks_are_drawn_per_sample_with_the_configured_probability() -> None:
    model = raw(tiny_svg(mask_probability=0.25))
    many = torch.rand(200, 3, 16, 16)
    latents = model.training_latents(many, generator=torch.Generator().manual_seed(1))
    masked = latents[:, 32:].flatten(2).std(2).amax(1) < 1e-5
    draws = torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.25
    assert torch.equal(masked, draws) and 30 < int(masked.sum()) < 70


def test_gradients_reach_everything_that_is_trained_and_nothing_else(images: torch.Tensor) -> None:
    model = tiny_svg().train()
    mask = torch.tensor([True, False, False])
    model(images, mask=mask).sample.square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert not any(name.startswith("encoder") for name, _ in model.named_parameters())
    assert not model.raw_latents(images).requires_grad


def test_the_scalars_are_constants_to_the_gradient(images: torch.Tensor) -> None:
    """With scalars given, the gradient is the same as with those of the batch (recipe: all four detached)."""
    gradients = []
    for given in (False, True):
        model = raw(tiny_svg())
        mask = torch.zeros(3, dtype=torch.bool)
        features = model.encoder_features(images)
        scalars = DistributionMatching.of_batch(features, model.residual_encoder(images)) if given else None
        model.training_latents(images, mask, features, scalars)[:, 32:].square().mean().backward()
        gradients.append(model.residual_encoder.network.heads[2].weight.grad)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (2, 6)])
def test_any_grid_is_decoded(grid: tuple[int, int]) -> None:
    model = tiny_svg()
    latents = torch.randn(2, 36, *grid)
    sample = model.decode(latents).sample
    assert sample.shape == (2, 3, 4 * grid[0], 4 * grid[1]) == (2, 3, *model.decoded_size(*grid))
    assert model._encoder is None
    with pytest.raises(UserError, match=r"\(B, 36, h, w\), got \(2, 32, 4, 4\)"):
        model.decode(latents[:, :32, :1, :1].expand(2, 32, 4, 4))


@torch.no_grad()
def test_without_residual_latents_are_the_encoders_tokens(images: torch.Tensor) -> None:
    model = raw(tiny_svg(use_residual=False))
    assert model.latent_shape == (32, 4, 4)
    expected = model.encoder(images).tokens.transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(model.encode(images).latent, expected)
    assert torch.equal(model.training_latents(images), expected)
    assert model(images).sample.shape == images.shape
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"decoder"}
    with pytest.raises(UserError, match="nothing to match"):
        model.calibrate_matching([images])


@torch.no_grad()
def test_slicing_changes_nothing(images: torch.Tensor) -> None:
    model = tiny_svg(matching="batch")
    expected = model(images).sample
    model.enable_slicing()
    torch.testing.assert_close(model(images).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("use_residual", [True, False])
def test_save_and_load(tmp_path: Path, images: torch.Tensor, use_residual: bool) -> None:
    model = tiny_svg(use_residual=use_residual)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert isinstance(loaded, SVGAutoencoder)
    latents = torch.randn(1, model.latent_shape[0], 4, 4)
    assert torch.equal(loaded.decode(latents).sample, model.decode(latents).sample)
    assert loaded._encoder is None
    assert torch.equal(loaded.encode(images).latent, model.encode(images).latent)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["latent_statistics.mean"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the first is latent_statistics\.mean"):
        SVGAutoencoder.from_pretrained(tmp_path)


@torch.no_grad()
def test_half_precision_keeps_statistics_and_scalars(tmp_path: Path, images: torch.Tensor) -> None:
    model = tiny_svg()
    model.save_pretrained(tmp_path)
    loaded = SVGAutoencoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.latents_mean.dtype == loaded.distribution_matching.scalars.dtype == torch.float32
    latents = loaded.encode(images).latent
    assert latents.dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), model.encode(images).latent, atol=0.1, rtol=0.05)
    assert loaded.decode(latents).sample.dtype == torch.bfloat16


def test_from_encoder(images: torch.Tensor) -> None:
    encoder = VisionEncoder.from_config(TINY_DINOV3)
    sizes = {
        name: value for name, value in tiny_svg_config().items() if name.startswith(("residual", "decoder", "norm"))
    }
    model = SVGAutoencoder.from_encoder(encoder, 16, matching="batch", **sizes).eval()
    assert model.encoder.norm_affine and model.latent_shape == (36, 4, 4)
    assert model.config.encoder_fingerprint == encoder.fingerprint()
    assert model.encode(images).latent.shape == (3, 36, 4, 4)
    with pytest.raises(UserError, match="18 px is no positive multiple of the decoder's patch 4 px"):
        SVGAutoencoder.from_encoder(encoder, 18, **sizes)
    with pytest.raises(UserError, match="32 px is not the encoder's grid 4 times the decoder's patch 4 px"):
        SVGAutoencoder.from_encoder(encoder, 32, **sizes)


@torch.no_grad()
def test_images_of_another_side_are_resized_and_others_refused(images: torch.Tensor) -> None:
    model = tiny_svg()
    larger = torch.nn.functional.interpolate(images, size=(32, 32), mode="nearest")
    assert model.encode(larger).latent.shape == (3, 36, 4, 4)
    for wrong in (images[0], images[:, :1], (images * 255).byte()):
        with pytest.raises(UserError, match="images must be"):
            model.encode(wrong)
        with pytest.raises(UserError, match="images must be"):
            model.training_latents(wrong)


@torch.no_grad()
def test_statistics_are_per_channel() -> None:
    model = tiny_svg()
    assert model.latents_mean.shape == (36, 1, 1)
    with pytest.raises(UserError, match=r"mean has shape \(32, 1, 1\), this autoencoder's latents have \(36, 1, 1\)"):
        model.set_statistics(torch.zeros(32, 1, 1))
    with pytest.raises(UserError, match="deviations of 0"):
        model.set_statistics(None, std=torch.zeros(36, 1, 1))
    with pytest.raises(UserError, match="not both"):
        model.set_statistics(None, torch.ones(36, 1, 1), std=torch.ones(36, 1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_size": 0}, "latent_size: 0 must be a positive whole number"),
        ({"residual_num_heads": 5}, "residual_hidden_size: 32 must be a multiple of its 5"),
        ({"mask_probability": 1.5}, "mask_probability: 1.5"),
        ({"matching": "layer"}, "matching: 'layer'"),
        ({"decoder_up_block_types": ("UpDecoderBlock2D",)}, "1 names for 3"),
        ({"decoder_up_block_types": ("UpBlock2D",) * 3}, "'UpBlock2D' is none of"),
        ({"decoder_block_out_channels": (8, 8, 15)}, "15 is no positive multiple of norm_num_groups 4"),
        ({"encoder": {"family": "dinov3_vit"}}, "the key 'config' is missing"),
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SVGAutoencoder(**tiny_svg_config(**changes))


@pytest.mark.parametrize(
    "options", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=["leaf", "block"]
)
@torch.no_grad()
def test_decodes_under_group_offload_to_disk(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_svg()
    latents = torch.randn(2, *model.latent_shape)
    expected = model.decode(latents).sample
    model.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **options)
    assert torch.equal(model.decode(latents).sample, expected)


def test_gradient_checkpointing_changes_no_gradient(images: torch.Tensor) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_svg()
        if checkpointed:
            model.enable_gradient_checkpointing()
        model(images, mask=torch.zeros(3, dtype=torch.bool)).sample.square().mean().backward()
        gradients.append(model.decoder.conv_in.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_who_depends_on_the_batch_says_so() -> None:
    assert tiny_svg(matching="batch").latents_depend_on_batch
    assert not tiny_svg().latents_depend_on_batch
    assert not tiny_svg(matching="none").latents_depend_on_batch
    assert not tiny_svg(matching="batch", use_residual=False).latents_depend_on_batch


def test_a_mask_of_another_length_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"mask must have shape \(3,\), .* got \(2,\)"):
        tiny_svg().training_latents(images, mask=torch.tensor([True, False]))

"""What identifies latents: all that they depend on, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import repagen
from repagen.data import DataConfig, open_image_dataset
from repagen.errors import UserError
from repagen.models.identity import describe_autoencoder
from repagen.models.latents import images_to_latents
from repagen.training.latent_cache import cache_latents, require_matching_cache

ENCODER = {
    "family": "dinov2_with_registers",
    "config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2,
        "image_size": 16, "patch_size": 8, "num_register_tokens": 1,
    },
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}  # fmt: skip
SVG_SIZES = {
    "encoder_channels": 16, "latent_size": 2, "residual_channels": 2, "residual_hidden_size": 16,
    "residual_num_layers": 1, "residual_num_heads": 2, "residual_intermediate_size": 16, "norm_num_groups": 4,
    "decoder_block_out_channels": (4, 4, 4, 8), "decoder_layers_per_block": 1,
    "decoder_up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def representation() -> Any:
    sizes = {"latent_channels": 16, "latent_size": 2, "decoder_patch_size": 8, **DECODER}
    return repagen.RepresentationAutoencoder(encoder=ENCODER, **sizes).eval()  # type: ignore[arg-type]


def svg() -> Any:
    model: Any = repagen.SVGAutoencoder(encoder=ENCODER, **SVG_SIZES).eval()  # type: ignore[arg-type]
    model.distribution_matching.set(torch.tensor([0.0, 1.0, 0.0, 1.0]))
    return model


def pixel() -> Any:
    return repagen.PixelAutoencoder(image_size=16)


def kl() -> Any:
    model: Any = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2)
    return model.eval()


def set_all(module: Any) -> None:
    for value in module.state_dict().values():
        value.add_(1)


CHANGES: list[tuple[Callable[[], Any], str, Callable[[Any], None]]] = [
    (representation, "statistics", lambda m: set_all(m.latent_statistics)),
    (representation, "encoder", lambda m: m.register_to_config(encoder_fingerprint="other")),
    (representation, "", lambda m: set_all(m.decoder)),
    (svg, "statistics", lambda m: set_all(m.latent_statistics)),
    (svg, "encoder", lambda m: set_all(m.residual_encoder)),
    (svg, "encoder", lambda m: m.distribution_matching.scalars.add_(1)),
    (svg, "encoder", lambda m: m.register_to_config(matching="batch")),
    (svg, "", lambda m: set_all(m.decoder)),
    (svg, "", lambda m: m.mask_token.data.add_(1)),
    (pixel, "statistics", lambda m: set_all(m.latent_statistics)),
    (kl, "encoder", lambda m: set_all(m.encoder)),
    (kl, "statistics", lambda m: m.register_to_config(latents_mean=[0.0, 1.0], latents_std=[1.0, 1.0])),
    (kl, "", lambda m: set_all(m.decoder)),
]


@pytest.mark.parametrize(("make", "changed", "change"), CHANGES)
def test_what_latents_depend_on_identifies_them(
    make: Callable[[], Any], changed: str, change: Callable[[Any], None]
) -> None:
    torch.manual_seed(0)
    model = make()
    before = describe_autoencoder(model)
    change(model)
    after = describe_autoencoder(model)
    assert [key for key in before if before[key] != after[key]] == ([changed] if changed else [])


def test_kinds_differ() -> None:
    descriptions = [describe_autoencoder(make()) for make in (representation, svg, pixel, kl)]
    assert len({(each["class"], each["encoder"]) for each in descriptions}) == 4


@pytest.mark.parametrize("make", [svg, pixel])
def test_every_kind_is_cached_and_recognised(tmp_path: Path, make: Callable[[], Any]) -> None:
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    dataset = open_image_dataset(DataConfig(path=str(tmp_path / "photos"), image_size=16))
    model = make()
    shards = cache_latents(model, dataset, tmp_path / "cache")
    images = torch.stack([dataset[i]["image"] for i in range(5)])
    cached = torch.stack([shards.load(i)["latent"] for i in range(5)])
    torch.testing.assert_close(cached, images_to_latents(model, images), atol=1e-5, rtol=0)
    require_matching_cache(shards, model)
    set_all(model.latent_statistics)
    with pytest.raises(UserError, match="statistics"):
        require_matching_cache(shards, model)

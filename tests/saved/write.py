"""Writes the tiny saved pipelines of a version, and what they give; see README.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from models.autoencoder_cases import tiny_autoencoder, tiny_svg
from pipelines.tiny_pipelines import ID2LABEL, tiny_pipeline, tiny_transformer
from safetensors.torch import save_file

from repagen import DDPMDiTTransformer2DModel, DiTDHTransformer2DModel, PixelAutoencoder, SiTTransformer2DModel

HERE = Path(__file__).parent
EXPECTED = "expected.safetensors"


def pipelines() -> dict[str, Any]:
    """A pipeline of each kind of autoencoder: the names of their folders => the pipelines."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    defaults = {"num_inference_steps": 3, "guidance_scale": 1.5}
    kl = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)

    def make(generator: type, vae: Any, channels: int, **options: Any) -> Any:
        transformer = tiny_transformer(generator, in_channels=channels)
        return tiny_pipeline(generator, transformer=transformer, vae=vae, sampling_defaults=defaults, **options)

    return {
        "ditdh_rae": make(DiTDHTransformer2DModel, tiny_autoencoder(), 32, id2label=ID2LABEL),
        "sit_svg": make(SiTTransformer2DModel, tiny_svg(), 36),
        "sit_pixels": make(SiTTransformer2DModel, PixelAutoencoder(), 3),
        "dit_kl": make(DDPMDiTTransformer2DModel, kl, 4),
    }


@torch.no_grad()
def given_by(pipe: Any) -> dict[str, torch.Tensor]:
    """Drawn images (2, 3, H, W), and the latents (2, C, h, w) of a fixed image by the pipeline's autoencoder."""
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 3], generator=torch.Generator().manual_seed(0), output_type="pt").images
    picture = torch.linspace(0, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    encoded = pipe.vae.encode(picture)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    return {"images": images.contiguous(), "latents": latents.contiguous()}


def main(version: str) -> None:
    for name, pipe in pipelines().items():
        folder = HERE / version / name
        pipe.save_pretrained(folder)
        save_file(given_by(pipe), folder / EXPECTED)


if __name__ == "__main__":
    main(sys.argv[1])
